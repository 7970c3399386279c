"""RCAN-it: the official layout with other activations, a residual scale and activations in the upsampler.

The activation (ReLU in its "base", SiLU in its "improved" setting) is used in blocks, gates and after every pixel
shuffle, and neither it nor the residual scale, 0.1 by default, is stored: taken for the official network, such a file
runs and is wrong by a third of the range.
"""

from dataclasses import replace

from srdeploy.models.dialects.base import Answer, Dialect, Hints, Question, Reading, Survey
from srdeploy.models.dialects.official_rcan import LAYOUT as OFFICIAL
from srdeploy.models.dialects.rcan_common import (
    colour_order_question,
    has_mean_shift,
    range_of_mean_shift,
    value_range_question,
)
from srdeploy.models.networks.rcan import RcanConfig

LAYOUT = replace(
    OFFICIAL,
    squeeze="body.{group}.body.{block}.body.3.excitation.0",
    expand="body.{group}.body.{block}.body.3.excitation.2",
    upsampler="tail.0.{step3}",
    residual_scale="body.{group}.body.{block}.res_scale",
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of RCAN-it."""
    sizes = LAYOUT.sizes(survey)
    if not has_mean_shift(survey):
        raise survey.refuse("sub_mean.weight is missing")
    learned = "body.0.body.0.res_scale" in survey
    config = RcanConfig(
        **sizes,
        residual_scale=None if learned else 0.1,
        group_convolution=f"body.0.body.{sizes['blocks']}.weight" in survey,
        upsampler_activation="relu",
    )
    survey.sources["group_convolution"] = f"body.0.body.{sizes['blocks']}.weight present or not"
    survey.sources["residual_scale"] = "body.*.body.*.res_scale present or not"
    questions = [
        _value_range(survey),
        Question(
            choice="activation",
            fields=("activation", "attention_activation", "upsampler_activation"),
            meaning="the activation of blocks, gates and upsampler",
            candidates=("relu", "silu"),
            any_value=True,
        ),
    ]
    if not learned:
        questions.append(
            Question(
                choice="res_scale",
                fields=("residual_scale",),
                meaning="the factor on every block's branch (with stochastic depth, times its survival probability)",
                candidates=(0.1, 1.0),
                any_value=True,
            )
        )
    questions.append(
        Question(
            choice="group_skip",
            fields=("group_skip",),
            meaning="whether a group adds its input to its output",
            candidates=(True, False),
            usual=Answer(True, "default", "all published settings have it"),
            probed=False,
        )
    )
    return Reading(config, (*questions, *colour_order_question(config.channels)))


def _value_range(survey: Survey) -> Question:
    stored = range_of_mean_shift(survey)
    answer = Answer(stored, "tensors", f"the stored mean shift is a mean on 0..{stored:g}") if stored else None
    return value_range_question(answer=answer)


DIALECT = Dialect(
    name="rcan-it",
    title="RCAN-it",
    source="zudi-lin/rcan-it",
    signature=("head.0.weight", "tail.1.weight", "body.0.body.0.body.3.excitation.0.weight"),
    read=read,
    layout=LAYOUT,
)
