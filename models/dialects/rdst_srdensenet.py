"""GinZhu's RDST SRDenseNet, the only public code that builds types h, hl and all.

Every layer reads everything before it, the upsampling is a chain of pixel shuffles, and mean and deviation are stored
as 1x1 convolutions. In type hl the low-level maps reach the bottleneck twice, in type all every block's whole output
goes there; which type it is follows from the bottleneck's input count.
"""

from dataclasses import dataclass, replace
from typing import Any

from srdeploy.models.dialects.base import Answer, Dialect, Hints, Question, Reading, Survey
from srdeploy.models.dialects.layouts import SrDenseNetLayout
from srdeploy.models.networks.srdensenet import SrDenseNetConfig

_LAYER = "body.{block}.body.{layer}.body."


@dataclass(frozen=True)
class RdstLayout:
    """The layout depends on the configuration: batch normalisation shifts indices, scale 1 has no upsampler."""

    def fixed(self, normalised: bool, slopes: bool, upscales: bool) -> SrDenseNetLayout:
        """Return the layout of one kind of file."""
        slope = _LAYER + ("2" if normalised else "1") if slopes else ""
        return SrDenseNetLayout(
            first="head.0",
            layer=_LAYER + "0",
            bottleneck="bottleneck",
            norm=_LAYER + "1" if normalised else "",
            block_activation=slope,
            repeated_activation=slope,
            upsampler="tail.0.{step3}" if normalised else "tail.0.{step2}",
            upsampler_norm="tail.0.{after3}" if normalised else "",
            last="tail.1" if upscales else "tail.0",
        )

    def of(self, config: SrDenseNetConfig) -> SrDenseNetLayout:
        """Return the layout that belongs to a configuration."""
        return self.fixed(
            normalised=config.normalisation != "none",
            slopes=config.activation == "prelu",
            upscales=bool(config.pixel_shuffles),
        )

    def modules(self, config: SrDenseNetConfig) -> dict[str, str]:
        """Return the source's path of every module, by its canonical path."""
        return self.of(config).modules(config)

    def copies(self, config: SrDenseNetConfig) -> dict[str, str]:
        """Return the keys under which the one shared slope is stored."""
        return self.of(config).copies(config)

    def templates(self) -> tuple[str, ...]:
        """Return the templates of all module paths."""
        kinds = [self.fixed(normalised, slopes, True) for normalised in (False, True) for slopes in (False, True)]
        return tuple(dict.fromkeys(template for kind in kinds for template in kind.templates()))


LAYOUT = RdstLayout()


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of RDST."""
    normalised = "body.0.body.0.body.1.running_mean" in survey
    slopes = f"body.0.body.0.body.{2 if normalised else 1}.weight" in survey
    layout = LAYOUT.fixed(normalised, slopes, upscales="tail.1.weight" in survey)
    sizes = layout.sizes(survey)
    width = sizes["bottleneck"]
    shuffles = survey.shuffle_factors(lambda step: _upsampler_key(layout, step), width) if _upscales(survey) else ()
    config = SrDenseNetConfig(
        **sizes,
        upsampled=width,
        deconvolutions=(),
        pixel_shuffles=shuffles,
        layer_input="everything",
        first_activation=False,
        bottleneck_activation=False,
        upsampler_activation=False,
        activation="prelu" if slopes else "relu",
        normalisation="after_convolutions" if normalised else "none",
        upsampler_normalisation=normalised,
        mean_shift="matrix" if "sub_mean.weight" in survey else "none",
    )
    return Reading(replace(config, **_kind(survey, config)), _questions(slopes))


def _upscales(survey: Survey) -> bool:
    return "tail.1.weight" in survey


def _upsampler_key(layout: SrDenseNetLayout, step: int) -> str:
    return layout.upsampler.format(step2=2 * step, step3=3 * step) + ".weight"


def _kind(survey: Survey, config: SrDenseNetConfig) -> dict[str, Any]:
    """Tell types h, hl and all apart by what the bottleneck reads."""
    kinds: list[dict[str, Any]] = [
        {"reconstruction_input": "last"},
        {"reconstruction_input": "low_and_last"},
        {"reconstruction_input": "all", "cumulative_blocks": True},
    ]
    inputs = survey.shape("bottleneck.weight", 4)[1]
    for kind in kinds:
        if replace(config, **kind).reconstruction_inputs() == inputs:
            survey.sources["reconstruction_input"] = f"bottleneck.weight reads {inputs} maps"
            return kind
    expected = ", ".join(str(replace(config, **kind).reconstruction_inputs()) for kind in kinds)
    raise survey.refuse(f"bottleneck.weight reads {inputs} maps", f"{expected} (types h, hl, all)")


def _questions(slopes: bool) -> tuple[Question, ...]:
    scale = Question(
        choice="layer_scale",
        fields=("layer_scale",),
        meaning="the factor on every dense layer's maps (dense_scale)",
        candidates=(1.0,),
        usual=Answer(1.0, "default", "dense_scale is 1 in the code's defaults and examples"),
        any_value=True,
        probed=False,
    )
    if slopes:
        return (scale,)
    activation = Question(
        choice="activation",
        fields=("activation",),
        meaning="the activation of the dense layers (leaky_relu with slope 0.2)",
        candidates=("relu", "leaky_relu"),
    )
    return activation, scale


DIALECT = Dialect(
    name="rdst-srdensenet",
    title="RDST SRDenseNet",
    source="GinZhu/RDST",
    signature=("bottleneck.weight", "head.0.weight"),
    read=read,
    layout=LAYOUT,
)
