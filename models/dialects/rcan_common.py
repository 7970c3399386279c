"""What several RCAN dialects share: the mean shift stored as convolutions, and the text of common questions."""

from srdeploy.models.choices import COLOUR_ORDERS, VALUE_RANGES
from srdeploy.models.dialects.base import Answer, Question, Survey


def has_mean_shift(survey: Survey) -> bool:
    """Return True if the mean shift convolutions are stored."""
    return "sub_mean.weight" in survey


def range_of_mean_shift(survey: Survey) -> float | None:
    """Return the value range that a stored mean shift was written for; None when its size fits neither.

    Public means lie between 0.4 and 0.5 of the range, so the bias is about -0.44 or about -114.
    """
    bias = survey.values("sub_mean.bias", 1)
    survey.sources["mean_shift"] = f"sub_mean.weight, sub_mean.bias (mean {bias.mean():.4g})"
    size = float(bias.abs().mean())
    if 0.05 < size < 5:
        return 1.0
    return 255.0 if 20 < size < 255 else None


def value_range_question(answer: Answer | None = None, usual: Answer | None = None) -> Question:
    """Return the question which value range the network works in."""
    return Question(
        choice="value_range",
        fields=("value_range",),
        meaning="the largest value of the network's own input and output",
        candidates=VALUE_RANGES[::-1],
        answer=answer,
        usual=usual,
    )


def colour_order_question(config_channels: int) -> tuple[Question, ...]:
    """Return the question in which order the channels are; none for one channel."""
    if config_channels != 3:
        return ()
    return (
        Question(
            choice="colours",
            fields=(),
            meaning="the order of the three channels",
            candidates=COLOUR_ORDERS,
            usual=Answer("rgb", "default", "every public source feeds RGB"),
            probed=False,
            contested=False,
        ),
    )
