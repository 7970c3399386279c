"""Lornatang's RCAN, four eras in two key layouts; the mean is a stored buffer.

From February to November 2022 the network multiplied by 255 inside, before and after that it did not. The files have
the same keys and shapes, and only the wrapper hints at the era.
"""

from dataclasses import replace

from srdeploy.models.dialects.base import Answer, Dialect, Hints, Question, Reading, Survey
from srdeploy.models.dialects.layouts import RcanLayout
from srdeploy.models.dialects.rcan_common import colour_order_question, value_range_question
from srdeploy.models.networks.rcan import RcanConfig

_BLOCK = "trunk.{group}.residual_group.{block}.residual_channel_attention_block."
LAYOUT = RcanLayout(
    first="conv1",
    conv1=_BLOCK + "0",
    conv2=_BLOCK + "2",
    squeeze=_BLOCK + "3.channel_attention_layer.1",
    expand=_BLOCK + "3.channel_attention_layer.3",
    group_end="trunk.{group}.residual_group.{blocks}",
    body_end="conv2",
    upsampler="upsampling.{step}.upsample_block.0",
    last="conv3",
)
_FIRST_BLOCK = "trunk.{group}.residual_group.{block}.rca_block."
FIRST_LAYOUT = replace(
    LAYOUT,
    conv1=_FIRST_BLOCK + "0",
    conv2=_FIRST_BLOCK + "2",
    squeeze=_FIRST_BLOCK + "3.ca_layer.1",
    expand=_FIRST_BLOCK + "3.ca_layer.3",
    upsampler="upsampling.{step2}",
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file from 16 February 2022 or later."""
    config = RcanConfig(**LAYOUT.sizes(survey), value_range=1.0, mean_shift="constant", mean=_stored(survey, "mean"))
    return Reading(config, (_factor(hints), *colour_order_question(config.channels)), frozenset({"mean"}))


def read_first(survey: Survey, hints: Hints) -> Reading:
    """Read a file of the first version, 10 February 2022: a stored deviation, and no factor inside."""
    config = RcanConfig(
        **FIRST_LAYOUT.sizes(survey),
        value_range=1.0,
        mean_shift="constant",
        mean=_stored(survey, "mean"),
        std=_stored(survey, "std"),
    )
    return Reading(config, colour_order_question(config.channels), frozenset({"mean", "std"}))


def _stored(survey: Survey, key: str) -> tuple[float, ...]:
    shape = survey.shape(key, 4)
    if shape != (1, 3, 1, 1):
        raise survey.refuse(f"{key} has shape {shape}", "(1, 3, 1, 1)")
    survey.sources[key] = f"{key} 1x3x1x1"
    return tuple(survey.values(key, 4).flatten().tolist())


def _factor(hints: Hints) -> Question:
    if "ema_state_dict" in hints.members:
        answer = Answer(1.0, "wrapper", "an ema_state_dict is next to the weights: written after November 2022")
    elif "scheduler" in hints.members:
        answer = Answer(
            255.0, "wrapper", "a scheduler but no ema_state_dict is next to the weights: written before December 2022"
        )
    else:
        answer = None
    return replace(
        value_range_question(answer=answer),
        meaning="whether the network multiplies by 255 inside (255) or not (1)",
    )


DIALECT = Dialect(
    name="lornatang-rcan",
    title="Lornatang RCAN",
    source="Lornatang/RCAN-PyTorch",
    signature=("trunk.0.residual_group.0.residual_channel_attention_block.0.weight", "mean"),
    read=read,
    layout=LAYOUT,
)
FIRST = Dialect(
    name="lornatang-rcan-first",
    title="Lornatang RCAN, first version",
    source="Lornatang/RCAN-PyTorch before 16 February 2022",
    signature=("trunk.0.residual_group.0.rca_block.0.weight", "mean", "std"),
    read=read_first,
    layout=FIRST_LAYOUT,
)
