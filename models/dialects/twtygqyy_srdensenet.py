"""twtygqyy's SRDenseNet in its three versions of December 2017, and GeoSR's descendant.

The activation is applied to each layer's maps and once more to every concatenation inside a block. With ReLU that
changes nothing; with the later PReLU, whose slope a block shares, it squares the slope. Bottleneck and reconstruction
have no bias, the bottleneck has no activation.
"""

from dataclasses import replace

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

RELU_LAYOUT = SrDenseNetLayout(
    first="lowlevel",
    layer="denseblock{block1}.0.conv{layer1}",
    bottleneck="bottleneck",
    upsampler="deconv.{step2}",
    last="reconstruction",
)
PRELU_LAYOUT = replace(
    RELU_LAYOUT,
    first_activation="relu",
    block_activation="denseblock{block1}.0.relu",
    upsampler_activation="deconv.{after2}",
)
GEOSR_LAYOUT = replace(PRELU_LAYOUT, upsampler="deconv.{step}.0", upsampler_activation="deconv.{step}.1")
FIRST_LAYOUT = replace(RELU_LAYOUT, bottleneck="", upsampler="upscale4x.{step2}")

DECONVOLUTION = Deconvolution(kernel=2, stride=2)


def read_prelu(survey: Survey, hints: Hints) -> Reading:
    """Read a file from 28 December 2017 or later."""
    return Reading(replace(_config(survey, PRELU_LAYOUT), activation="prelu"))


def read_relu(survey: Survey, hints: Hints) -> Reading:
    """Read a file from 24 to 28 December 2017."""
    return Reading(_config(survey, RELU_LAYOUT))


def read_geosr(survey: Survey, hints: Hints) -> Reading:
    """Read a file of GeoSR."""
    return Reading(replace(_config(survey, GEOSR_LAYOUT), activation="prelu"))


def read_first(survey: Survey, hints: Hints) -> Reading:
    """Read a file of the first commit: blocks in a chain, low-level and last block's maps, no bottleneck."""
    return Reading(replace(_config(survey, FIRST_LAYOUT), block_input="previous", reconstruction_input="low_and_last"))


def _config(survey: Survey, layout: SrDenseNetLayout) -> SrDenseNetConfig:
    return SrDenseNetConfig(
        **layout.sizes(survey),
        **layout.doubling(survey, DECONVOLUTION),
        reactivate_concatenations=True,
        bottleneck_activation=False,
        bottleneck_bias=False,
        upsampler_bias=False,
        last_bias=False,
    )


_SOURCE = "twtygqyy/pytorch-SRDenseNet"
GEOSR = Dialect(
    name="geosr-srdensenet",
    title="GeoSR SRDenseNet",
    source="GeoVision-Lab/GeoSR",
    signature=("lowlevel.weight", "bottleneck.weight", "relu.weight", "deconv.0.0.weight"),
    read=read_geosr,
    layout=GEOSR_LAYOUT,
)
PRELU = Dialect(
    name="twtygqyy-srdensenet-prelu",
    title="twtygqyy SRDenseNet with PReLU",
    source=_SOURCE,
    signature=("lowlevel.weight", "bottleneck.weight", "relu.weight"),
    absent=("deconv.0.0.weight",),
    read=read_prelu,
    layout=PRELU_LAYOUT,
)
RELU = Dialect(
    name="twtygqyy-srdensenet-relu",
    title="twtygqyy SRDenseNet with ReLU",
    source=_SOURCE + ", 24 to 28 December 2017",
    signature=("lowlevel.weight", "bottleneck.weight"),
    absent=("relu.weight",),
    read=read_relu,
    layout=RELU_LAYOUT,
)
FIRST = Dialect(
    name="twtygqyy-srdensenet-first",
    title="twtygqyy SRDenseNet, first version (HL)",
    source=_SOURCE + ", first commit",
    signature=("lowlevel.weight", "upscale4x.0.weight"),
    absent=("bottleneck.weight",),
    read=read_first,
    layout=FIRST_LAYOUT,
)
