"""yjn870's RCAN: no mean shift, 0..1, and one upsampling convolution for every scale."""

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import RcanLayout
from srdeploy.models.dialects.rcan_common import colour_order_question
from srdeploy.models.networks.rcan import RcanConfig

LAYOUT = RcanLayout(
    first="sf",
    conv1="rgs.{group}.module.{block}.module.0",
    conv2="rgs.{group}.module.{block}.module.2",
    squeeze="rgs.{group}.module.{block}.module.3.module.1",
    expand="rgs.{group}.module.{block}.module.3.module.3",
    group_end="rgs.{group}.module.{blocks}",
    body_end="conv1",
    upsampler="upscale.{step2}",
    last="conv2",
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of yjn870's RCAN."""
    config = RcanConfig(**LAYOUT.sizes(survey), value_range=1.0, mean_shift="none")
    return Reading(config, colour_order_question(config.channels))


DIALECT = Dialect(
    name="yjn870-rcan",
    title="yjn870 RCAN",
    source="yjn870/RCAN-pytorch",
    signature=("sf.weight", "rgs.0.module.0.module.0.weight"),
    read=read,
    layout=LAYOUT,
)
