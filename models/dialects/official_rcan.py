"""The official RCAN key layout, which five code bases share and feed in three different ways.

yulunzhang/RCAN (0..255), EDSR-PyTorch (0..255, or 0..1 with --rgb_range 1), torchSR (the official values; 0..1 with
x255 inside, which is the same function), traiNNer-redux (0..1 without mean shift, or x255 inside with it) and
super-image (0..1 *without* x255, although the stored shift is about -114). The mean shift was trainable by accident
in several of them, so the stored matrices are used as they are.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from srdeploy.models.choices import ACTIVATIONS
from srdeploy.models.dialects.base import Answer, Dialect, Hints, Question, Reading, Survey
from srdeploy.models.dialects.layouts import RcanLayout
from srdeploy.models.dialects.rcan_common import (
    colour_order_question,
    has_mean_shift,
    range_of_mean_shift,
    value_range_question,
)
from srdeploy.models.networks.rcan import RcanConfig

LAYOUT = RcanLayout(
    first="head.0",
    conv1="body.{group}.body.{block}.body.0",
    conv2="body.{group}.body.{block}.body.2",
    squeeze="body.{group}.body.{block}.body.3.conv_du.0",
    expand="body.{group}.body.{block}.body.3.conv_du.2",
    group_end="body.{group}.body.{blocks}",
    body_end="body.{groups}",
    upsampler="tail.0.{step2}",
    last="tail.1",
)
UNSHUFFLE_LAYOUT = replace(LAYOUT, first="head.1")

_SUPER_IMAGE_NAME = re.compile(r"pytorch_model_\d+x\.pt")


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of the official layout."""
    sizes = LAYOUT.sizes(survey)
    _check_metadata(survey, hints.metadata, sizes)
    shifted = has_mean_shift(survey)
    config = RcanConfig(**sizes, value_range=255.0 if shifted else 1.0, mean_shift="matrix" if shifted else "none")
    value_range = _value_range(survey, hints) if shifted else _no_shift_range(survey)
    questions = (value_range, _activation(survey, hints), *colour_order_question(config.channels))
    return Reading(config, questions)


def read_unshuffle(survey: Survey, hints: Hints) -> Reading:
    """Read traiNNer-redux's variant that starts with a pixel unshuffle: the tail scales by 4, the network by 1 or 2."""
    sizes = UNSHUFFLE_LAYOUT.sizes(survey)
    inputs = survey.shape("head.1.weight", 4)[1]
    factor = math.isqrt(inputs // sizes["channels"])
    if factor < 2 or factor**2 * sizes["channels"] != inputs or sizes["scale"] % factor:
        raise survey.refuse(
            f"head.1.weight reads {inputs} channels and the tail enlarges {sizes['scale']} times",
            f"{sizes['channels']} times the square of an unshuffle factor that divides the enlargement",
        )
    survey.sources["unshuffle"] = f"head.1.weight reads {inputs} = {factor}^2 x {sizes['channels']} channels"
    sizes["scale"] //= factor
    _check_metadata(survey, hints.metadata, sizes)
    shifted = has_mean_shift(survey)
    config = RcanConfig(
        **sizes,
        unshuffle=factor,
        value_range=255.0 if shifted else 1.0,
        mean_shift="matrix" if shifted else "none",
    )
    value_range = _value_range(survey, hints) if shifted else _no_shift_range(survey)
    return Reading(config, (value_range, _activation(survey, hints), *colour_order_question(config.channels)))


def _no_shift_range(survey: Survey) -> Question:
    survey.sources["mean_shift"] = "no sub_mean.* keys"
    return value_range_question(
        answer=Answer(1.0, "tensors", "no mean shift is stored: only traiNNer-redux writes such files, for 0..1")
    )


def _value_range(survey: Survey, hints: Hints) -> Question:
    if "rgb_range" in hints.metadata:
        stated = hints.metadata["rgb_range"]
        if stated not in (1, 255):
            raise survey.refuse(f"its metadata has rgb_range {stated!r}", "1 or 255")
        return value_range_question(answer=Answer(float(stated), "metadata", f"rgb_range is {stated:g}"))
    stored = range_of_mean_shift(survey)
    if stored == 1.0:
        return value_range_question(answer=Answer(1.0, "tensors", "the stored mean shift is a mean on 0..1"))
    if hints.neighbor.get("model_type") == "RCAN" or _SUPER_IMAGE_NAME.fullmatch(hints.file_name):
        reason = "the file name or the config.json beside it is super-image's, which feeds 0..1 to a 0..255 mean shift"
        return value_range_question(answer=Answer(1.0, "wrapper", reason))
    if stored == 255.0:
        reason = (
            "the stored mean shift is a mean on 0..255, which all public sources feed with 0..255 inside except "
            "super-image (--value-range 1)"
        )
        return value_range_question(usual=Answer(255.0, "default", reason))
    return value_range_question()


def _activation(survey: Survey, hints: Hints) -> Question:
    candidates = tuple(kind for kind in ACTIVATIONS if kind not in ("prelu", "identity"))
    answer = None
    if "act_mode" in hints.metadata:
        stated = hints.metadata["act_mode"]
        if stated not in (*candidates, "none"):
            raise survey.refuse(f"its metadata has act_mode {stated!r}", ", ".join((*candidates, "none")))
        answer = Answer("identity" if stated == "none" else stated, "metadata", f"act_mode is {stated}")
    return Question(
        choice="activation",
        fields=("activation",),
        meaning="the activation between a block's two convolutions",
        candidates=candidates,
        answer=answer,
        usual=Answer(
            "relu", "default", "all sources of this layout use ReLU unless traiNNer-redux's options name another"
        ),
        probed=False,
        contested=False,
    )


def _check_metadata(survey: Survey, metadata: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Refuse a file whose metadata contradicts its tensors."""
    names = {
        "scale": "scale",
        "n_resgroups": "groups",
        "n_resblocks": "blocks",
        "n_feats": "features",
        "n_colors": "channels",
    }
    for name, size in names.items():
        if name in metadata and metadata[name] != sizes[size]:
            raise survey.refuse(f"its metadata has {name} {metadata[name]} and its tensors have {sizes[size]}")


DIALECT = Dialect(
    name="official-rcan",
    title="the official RCAN layout",
    source="yulunzhang/RCAN, EDSR-PyTorch, torchSR, super-image, traiNNer-redux",
    signature=("head.0.weight", "tail.1.weight", "body.0.body.0.body.3.conv_du.0.weight"),
    read=read,
    layout=LAYOUT,
)
UNSHUFFLE = Dialect(
    name="trainner-rcan-unshuffle",
    title="traiNNer-redux RCAN with pixel unshuffle",
    source="the-database/traiNNer-redux",
    signature=("head.1.weight", "tail.1.weight", "body.0.body.0.body.3.conv_du.0.weight"),
    absent=("head.0.weight",),
    read=read_unshuffle,
    layout=UNSHUFFLE_LAYOUT,
)
