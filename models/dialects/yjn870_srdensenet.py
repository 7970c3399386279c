"""yjn870's SRDenseNet_All, the only public one with all 68 activations of the paper."""

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import PAPER_DECONVOLUTION, SrDenseNetConfig

LAYOUT = SrDenseNetLayout(
    first="conv.conv",
    layer="dense_blocks.{block}.block.{layer}.conv",
    bottleneck="bottleneck.0",
    upsampler="deconv.{step2}",
    last="reconstruction",
)

NOTE = (
    "yjn870's own script trains on a luma with a red weight of 64.738 instead of BT.601's 65.738; the file does not "
    "say which it was, and the standard luma that is fed here differs by at most 1/255"
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of yjn870's SRDenseNet."""
    config = SrDenseNetConfig(**LAYOUT.sizes(survey), **LAYOUT.doubling(survey, PAPER_DECONVOLUTION))
    return Reading(config, notes=(NOTE,) if config.channels == 1 else ())


DIALECT = Dialect(
    name="yjn870-srdensenet",
    title="yjn870 SRDenseNet",
    source="yjn870/SRDenseNet-pytorch",
    signature=("conv.conv.weight", "dense_blocks.0.block.0.conv.weight"),
    read=read,
    layout=LAYOUT,
)
