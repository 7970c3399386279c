"""Answer what the tensors leave open, and keep the evidence.

In this order: the file's own metadata, the user's flag, the wrapper (or tensor values) where it is reliable, a run of
every remaining candidate on real images, the default of the source's own code, and otherwise a
refusal that lists candidates and flags. A flag that contradicts the metadata or the network's family is an error, not
a winner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from srdeploy.core.errors import InputError, UsageError
from srdeploy.models.choices import Choices, flag_of, flag_value
from srdeploy.models.dialects.base import Answer, AnsweredBy, Question
from srdeploy.models.networks.spec import NetworkConfig


@dataclass(frozen=True)
class Ranked:
    """One combination of candidates that was run on real images.

    Attributes:
        values: by choice.
        psnr_db: between the downscaled output and the input, mean over the images, peak 1.
    """

    values: dict[str, Any]
    psnr_db: float


@dataclass(frozen=True)
class Decision:
    """How one question was settled.

    Attributes:
        choice: name of the question.
        fields: configuration fields that took the value.
        meaning: what it is about.
        value: what was taken; None when it is open.
        by: where the answer comes from.
        reason: why.
        candidates: values found in public code.
        contested: public files are known to differ, so that a default deserves a word.
    """

    choice: str
    fields: tuple[str, ...]
    meaning: str
    value: Any
    by: AnsweredBy
    reason: str
    candidates: tuple[Any, ...]
    contested: bool = True


@dataclass(frozen=True)
class Resolved:
    """The configuration with every question answered, and how."""

    config: NetworkConfig
    decisions: tuple[Decision, ...]
    ranking: tuple[Ranked, ...] = ()

    def value(self, choice: str) -> Any:
        """Return what was taken for a choice; None when it was no question."""
        return next((decision.value for decision in self.decisions if decision.choice == choice), None)


Rank = Callable[[Sequence[dict[str, Any]]], list[Ranked]]
"""Runs combinations of candidates on real images; returns them best first."""

CLEAR_MARGIN_DB = 0.5
"""A smaller lead over the second-best combination is not taken for an answer."""

PLAUSIBLE_DB = 20.0
"""Networks that run as they were trained reach 30 to 50 dB; if the best candidate stays below this, none is right."""


def resolve(
    config: NetworkConfig,
    questions: Sequence[Question],
    choices: Choices,
    title: str,
    rank: Rank | None = None,
    *,
    strict: bool = True,
) -> Resolved:
    """Settle every question.

    Args:
        config: with each question at some candidate.
        questions: of the dialect.
        choices: what the user states.
        title: of the dialect, for messages.
        rank: runs combinations on real images; None when there are no images.
        strict: refuse what stays open; otherwise it is listed as a decision by nobody ("open"), for showing only.

    Raises:
        UsageError: a flag contradicts the file or asks what is no question in this family.
        InputError: a question stays open and `strict` is true.
    """
    _refuse_foreign_flags(config, questions, choices, title)
    settled: dict[str, Answer] = {}
    for question in questions:
        answer = _answer(question, choices)
        if answer is not None:
            settled[question.choice] = answer
    ranking: list[Ranked] = []
    open_questions = [question for question in questions if question.choice not in settled and question.probed]
    if open_questions and rank is not None:
        ranking = rank(_combinations(open_questions))
        settled |= _from_ranking(open_questions, ranking)
    for question in questions:
        if question.choice not in settled and question.usual is not None:
            settled[question.choice] = question.usual
    still_open = [question for question in questions if question.choice not in settled]
    if still_open and strict:
        raise _unresolved(still_open, title, ranking)
    values = {choice: answer.value for choice, answer in settled.items()}
    for question in still_open:
        reason = f"state {question.flag}" + ", or pass --probe IMAGES" * question.probed
        settled[question.choice] = Answer(None, "open", reason)
    return Resolved(
        config=with_values(config, questions, values),
        decisions=tuple(_decision(question, settled[question.choice]) for question in questions),
        ranking=tuple(ranking),
    )


def with_values(config: NetworkConfig, questions: Sequence[Question], values: dict[str, Any]) -> NetworkConfig:
    """Return the configuration with some questions answered."""
    changes: dict[str, Any] = {}
    for question in questions:
        if question.choice in values:
            changes |= dict.fromkeys(question.fields, values[question.choice])
    try:
        return replace(config, **changes)
    except ValueError as error:
        raise UsageError(f"the given values do not fit the network ({error})") from error


def _refuse_foreign_flags(config: NetworkConfig, questions: Sequence[Question], choices: Choices, title: str) -> None:
    """A flag for something that this family fixes must agree with it; "weights" is settled before."""
    fixed = {"res_scale": "residual_scale"}
    asked = {question.choice for question in questions}
    for name, value in choices.stated().items():
        if name in asked or name == "weights" or (name == "colours" and value == "rgb"):
            continue
        if not hasattr(config, fixed.get(name, name)):
            raise UsageError(f"{flag_of(name)} does not apply to {title}", next_step="omit the flag")
        actual = getattr(config, fixed.get(name, name))
        if actual != value:
            raise UsageError(
                f"{flag_of(name)} {flag_value(value)} contradicts {title}, which has {flag_value(actual)}",
                next_step="omit the flag",
            )


def _answer(question: Question, choices: Choices) -> Answer | None:
    """Return the answer of metadata, flag or wrapper."""
    stated = getattr(choices, question.choice)
    known = question.answer
    if known is not None and known.by == "metadata":
        if stated is not None and stated != known.value:
            raise UsageError(
                f"{question.flag} {flag_value(stated)} contradicts the file's metadata ({known.reason})",
                next_step="omit the flag",
            )
        return known
    if stated is not None:
        if stated not in question.candidates and not question.any_value:
            raise UsageError(
                f"{question.flag} {flag_value(stated)}", expected=" or ".join(map(flag_value, question.candidates))
            )
        return Answer(stated, "flag", f"{question.flag} {flag_value(stated)}")
    return known


def _combinations(questions: Sequence[Question]) -> list[dict[str, Any]]:
    combinations: list[dict[str, Any]] = [{}]
    for question in questions:
        combinations = [
            {**combination, question.choice: value} for combination in combinations for value in question.candidates
        ]
    return combinations


def _from_ranking(questions: Sequence[Question], ranking: Sequence[Ranked]) -> dict[str, Answer]:
    """Take the clear answers of a ranking: for each question, the lead of the best value over the second best."""
    answers: dict[str, Answer] = {}
    best = ranking[0]
    if best.psnr_db < PLAUSIBLE_DB:
        return answers
    for question in questions:
        value = best.values[question.choice]
        others = [entry.psnr_db for entry in ranking if entry.values[question.choice] != value]
        lead_db = best.psnr_db - max(others) if others else float("inf")
        if lead_db >= CLEAR_MARGIN_DB:
            reason = f"downscaled output against input: {best.psnr_db:.2f} dB, {lead_db:.2f} dB better than the next"
            answers[question.choice] = Answer(value, "probe", reason)
    return answers


def _decision(question: Question, answer: Answer) -> Decision:
    return Decision(
        choice=question.choice,
        fields=question.fields,
        meaning=question.meaning,
        value=answer.value,
        by=answer.by,
        reason=answer.reason,
        candidates=question.candidates,
        contested=question.contested,
    )


def _unresolved(questions: Sequence[Question], title: str, ranking: Sequence[Ranked]) -> InputError:
    parts = [
        f"{question.meaning} ({question.flag} {' or '.join(map(flag_value, question.candidates))})"
        for question in questions
    ]
    found = f"the checkpoint is {title}, whose files leave open {' and '.join(parts)}"
    if ranking:
        tries = ", ".join(
            f"{' '.join(f'{flag_of(choice)} {flag_value(value)}' for choice, value in entry.values.items())}: "
            f"{entry.psnr_db:.2f} dB"
            for entry in ranking[:4]
        )
        return InputError(
            f"{found}, and the probe images do not decide it ({tries})",
            next_step="pass the flags, or probe with more and larger images",
        )
    step = "pass the flags"
    if any(question.probed for question in questions):
        step += ", or pass --probe IMAGES to try the candidates on real images"
    return InputError(found, next_step=step)
