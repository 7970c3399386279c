"""ZFhuang's SRDenseNet: batch normalisation and activation before every dense layer, and 2H - 1 rows per doubling.

Its deconvolutions are 3x3 with stride 2 and without output padding, so x2 returns 2H - 1 rows and x4 returns 4H - 3.
"""

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

LAYOUT = SrDenseNetLayout(
    first="input.0",
    layer="dense_blocks.{block}.convs.{layer}.2",
    norm="dense_blocks.{block}.convs.{layer}.0",
    bottleneck="bottleneck.0",
    upsampler="deconv.{step}",
    last="output",
)

DECONVOLUTION = Deconvolution(kernel=3, stride=2, padding=1)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of ZFhuang's SRDenseNet."""
    config = SrDenseNetConfig(
        **LAYOUT.sizes(survey),
        **LAYOUT.doubling(survey, DECONVOLUTION),
        layer_input="everything",
        normalisation="before_layers",
        bottleneck_activation=False,
        upsampler_activation=False,
    )
    trim = config.scale - 1
    return Reading(config, notes=(f"the output is {trim} pixels short of {config.scale}x at the bottom and right",))


DIALECT = Dialect(
    name="zfhuang-srdensenet",
    title="ZFhuang SRDenseNet",
    source="ZFhuang/DiveIntoDLSketches",
    signature=("input.0.weight", "dense_blocks.0.convs.0.0.running_mean"),
    read=read,
    layout=LAYOUT,
)
