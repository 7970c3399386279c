"""wxywhu's SRDenseNet: every layer reads everything before it, and the upsampling has no activations.

Two versions with the same arithmetic: v1 names its blocks dense1, dense2, ...; v2 keeps them in a list. The same file
is also found as chenquan-hdu/SRDensenet-self.
"""

from dataclasses import replace

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

V1_LAYOUT = SrDenseNetLayout(
    first="conv1",
    layer="dense{block1}.{layer}.conv",
    bottleneck="Bottleneck",
    upsampler="convt{step1}",
    last="conv2",
)
V2_LAYOUT = replace(V1_LAYOUT, layer="denseblock.{block}.block.{layer}.conv")

DECONVOLUTION = Deconvolution(kernel=4, stride=2, padding=1)


def read_v1(survey: Survey, hints: Hints) -> Reading:
    """Read a file of the first version."""
    return _read(survey, V1_LAYOUT)


def read_v2(survey: Survey, hints: Hints) -> Reading:
    """Read a file of the second version."""
    return _read(survey, V2_LAYOUT)


def _read(survey: Survey, layout: SrDenseNetLayout) -> Reading:
    return Reading(
        SrDenseNetConfig(
            **layout.sizes(survey),
            **layout.doubling(survey, DECONVOLUTION),
            layer_input="everything",
            bottleneck_activation=False,
            upsampler_activation=False,
        )
    )


V1 = Dialect(
    name="wxywhu-srdensenet-v1",
    title="wxywhu SRDenseNet (first version)",
    source="wxywhu/SRDenseNet-pytorch",
    signature=("Bottleneck.weight", "dense1.0.conv.weight"),
    read=read_v1,
    layout=V1_LAYOUT,
)
V2 = Dialect(
    name="wxywhu-srdensenet-v2",
    title="wxywhu SRDenseNet (second version)",
    source="wxywhu/SRDenseNet-pytorch, chenquan-hdu/SRDensenet-self",
    signature=("Bottleneck.weight", "denseblock.0.block.0.conv.weight"),
    read=read_v2,
    layout=V2_LAYOUT,
)
