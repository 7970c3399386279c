"""LoSealL's VideoSuperResolution RCAN: 0..255 inside, the mean shift frozen in the file."""

from srdeploy.models.dialects.base import Answer, Dialect, Hints, Reading, Survey
from srdeploy.models.dialects.layouts import RcanLayout
from srdeploy.models.dialects.rcan_common import (
    colour_order_question,
    has_mean_shift,
    range_of_mean_shift,
    value_range_question,
)
from srdeploy.models.networks.rcan import RcanConfig

LAYOUT = RcanLayout(
    first="head.0.body.0",
    conv1="body.{group}.body.{block}.c1.0",
    conv2="body.{group}.body.{block}.c2",
    squeeze="body.{group}.body.{block}.c3.0",
    expand="body.{group}.body.{block}.c4.0",
    group_end="body.{group}.body.{blocks}.body.0",
    body_end="body.{groups}.body.0",
    upsampler="tail.0.body.{step}.0",
    last="tail.1.body.0",
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of VideoSuperResolution."""
    if not has_mean_shift(survey):
        raise survey.refuse("sub_mean.weight is missing")
    config = RcanConfig(**LAYOUT.sizes(survey))
    stored = range_of_mean_shift(survey)
    answer = Answer(stored, "tensors", f"the stored mean shift is a mean on 0..{stored:g}") if stored else None
    return Reading(config, (value_range_question(answer=answer), *colour_order_question(config.channels)))


DIALECT = Dialect(
    name="loseall-rcan",
    title="VideoSuperResolution RCAN",
    source="LoSealL/VideoSuperResolution",
    signature=("head.0.body.0.weight", "tail.1.body.0.weight", "body.0.body.0.c1.0.weight"),
    read=read,
    layout=LAYOUT,
)
