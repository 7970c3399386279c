"""Lornatang's SRDenseNet: new maps come first where blocks are joined, deconvolutions are as wide as their stride.

Joined in the other order such a file loads without complaint, as all shapes agree, and is wrong everywhere.
"""

from dataclasses import replace

from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

LAYOUT = SrDenseNetLayout(
    first="conv1.0",
    layer="dcb{block1}.0.conv{layer1}",
    bottleneck="conv2",
    upsampler="upsampling.{step}.upsample_block.0",
    last="conv3",
)
EARLY_LAYOUT = replace(LAYOUT, upsampler="upsampling.{step2}")


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file from September 2022 or later."""
    return _read(survey, LAYOUT)


def read_early(survey: Survey, hints: Hints) -> Reading:
    """Read a file from December 2021 to August 2022."""
    return _read(survey, EARLY_LAYOUT)


def _read(survey: Survey, layout: SrDenseNetLayout) -> Reading:
    kernels = layout.kernels(survey)
    if not kernels or min(kernels) < 2:
        raise survey.refuse(f"its deconvolutions have kernels {kernels}", "2x2 or 3x3 ones")
    first = layout.upsampler.format(step=0, step2=0) + ".weight"
    config = SrDenseNetConfig(
        **layout.sizes(survey),
        # Kernel and stride are the same number in this family.
        deconvolutions=tuple(Deconvolution(kernel=kernel, stride=kernel) for kernel in kernels),
        upsampled=survey.size("upsampled", first, 1),
        block_order="new_first",
        bottleneck_activation=False,
    )
    return Reading(config)


DIALECT = Dialect(
    name="lornatang-srdensenet",
    title="Lornatang SRDenseNet",
    source="Lornatang/SRDenseNet-PyTorch",
    signature=("dcb1.0.conv1.weight", "upsampling.0.upsample_block.0.weight"),
    read=read,
    layout=LAYOUT,
)
EARLY = Dialect(
    name="lornatang-srdensenet-2021",
    title="Lornatang SRDenseNet of 2021",
    source="Lornatang/SRDenseNet-PyTorch before September 2022",
    signature=("dcb1.0.conv1.weight", "upsampling.0.weight"),
    read=read_early,
    layout=EARLY_LAYOUT,
)
