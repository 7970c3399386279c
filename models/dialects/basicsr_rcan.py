"""BasicSR's RCAN. Mean, range and residual scale are attributes of its class and not in the file."""

from srdeploy.models.choices import DIV2K_MEAN, MEANS
from srdeploy.models.dialects.base import Answer, Dialect, Hints, Question, Reading, Survey
from srdeploy.models.dialects.layouts import RcanLayout
from srdeploy.models.dialects.rcan_common import colour_order_question, value_range_question
from srdeploy.models.networks.rcan import RcanConfig

LAYOUT = RcanLayout(
    first="conv_first",
    conv1="body.{group}.residual_group.{block}.rcab.0",
    conv2="body.{group}.residual_group.{block}.rcab.2",
    squeeze="body.{group}.residual_group.{block}.rcab.3.attention.1",
    expand="body.{group}.residual_group.{block}.rcab.3.attention.3",
    group_end="body.{group}.conv",
    body_end="conv_after_body",
    upsampler="upsample.{step2}",
    last="conv_last",
)


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of BasicSR."""
    sizes = LAYOUT.sizes(survey)
    coloured = sizes["channels"] == 3
    config = RcanConfig(
        **sizes,
        value_range=255.0,
        mean_shift="constant" if coloured else "none",
        mean=DIV2K_MEAN if coloured else None,
    )
    questions = [
        value_range_question(
            usual=Answer(255.0, "default", "img_range is 255 unless the training options say otherwise")
        ),
        Question(
            choice="res_scale",
            fields=("residual_scale",),
            meaning="the factor on every block's branch",
            candidates=(1.0, 0.1),
            usual=Answer(1.0, "default", "res_scale is 1 unless the training options say otherwise"),
            any_value=True,
        ),
    ]
    if coloured:
        questions.append(
            Question(
                choice="mean",
                fields=("mean",),
                meaning="the mean colour subtracted before and added after the network, on 0..1",
                candidates=tuple(MEANS.values()),
                usual=Answer(DIV2K_MEAN, "default", "rgb_mean is DIV2K's unless the training options say otherwise"),
                any_value=True,
                probed=False,
            )
        )
    return Reading(config, (*questions, *colour_order_question(config.channels)))


DIALECT = Dialect(
    name="basicsr-rcan",
    title="BasicSR RCAN",
    source="XPixelGroup/BasicSR",
    signature=("conv_first.weight", "conv_after_body.weight", "body.0.residual_group.0.rcab.0.weight"),
    read=read,
    layout=LAYOUT,
)
