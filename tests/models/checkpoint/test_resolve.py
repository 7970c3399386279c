"""What tensors cannot say is answered in the stated order, never guessed in silence, and contradictions are refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srdeploy.core.errors import InputError, UsageError
from srdeploy.models.checkpoint.load import Choices, load_checkpoint
from srdeploy.models.checkpoint.recognise import source_names
from srdeploy.models.checkpoint.resolve import Ranked, resolve
from srdeploy.models.dialects.base import Answer, Question
from srdeploy.models.dialects.lornatang_rcan import DIALECT as LORNATANG
from srdeploy.models.networks.rcan import Rcan, RcanConfig

EXAMPLES = Path(__file__).parents[3] / "examples"
CONFIG = RcanConfig(scale=2, groups=1, blocks=1, features=4, attention_width=1, upsampler=(2,), mean_shift="none")
RANGE = Question("value_range", ("value_range",), "the range", (255.0, 1.0))
SCALE = Question("res_scale", ("residual_scale",), "the factor", (0.1, 1.0), any_value=True)
METADATA = Answer(1.0, "metadata", "rgb_range is 1")
WRAPPER = Answer(255.0, "wrapper", "a scheduler lies beside the weights")
USUAL = Answer(255.0, "default", "the code's default")


def ranked(*scores: float) -> Callable[[Sequence[dict[str, Any]]], list[Ranked]]:
    def rank(combinations: Sequence[dict[str, Any]]) -> list[Ranked]:
        entries = [Ranked(dict(values), score) for values, score in zip(combinations, scores, strict=True)]
        return sorted(entries, key=lambda entry: -entry.psnr_db)

    return rank


@pytest.mark.parametrize(
    ("question", "choices", "rank", "value", "by"),
    [
        pytest.param(replace(RANGE, answer=METADATA), Choices(value_range=1.0), None, 1.0, "metadata", id="metadata"),
        pytest.param(replace(RANGE, answer=WRAPPER), Choices(value_range=1.0), None, 1.0, "flag", id="flag"),
        pytest.param(replace(RANGE, answer=WRAPPER, usual=None), Choices(), ranked(), 255.0, "wrapper", id="wrapper"),
        pytest.param(replace(RANGE, usual=USUAL), Choices(), ranked(30.0, 40.0), 1.0, "probe", id="probe"),
        pytest.param(replace(RANGE, usual=USUAL), Choices(), ranked(40.0, 39.8), 255.0, "default", id="close probe"),
        pytest.param(replace(RANGE, usual=USUAL), Choices(), ranked(3.0, 12.0), 255.0, "default", id="hopeless probe"),
        pytest.param(replace(RANGE, usual=USUAL), Choices(), None, 255.0, "default", id="default"),
        pytest.param(
            replace(RANGE, usual=USUAL, probed=False), Choices(), ranked(), 255.0, "default", id="not for probing"
        ),
    ],
)
def test_the_order_of_answers(question: Question, choices: Choices, rank: Any, value: float, by: str) -> None:
    resolved = resolve(CONFIG, [question], choices, "a family", rank)

    assert resolved.config == replace(CONFIG, value_range=value)
    assert [(decision.value, decision.by) for decision in resolved.decisions] == [(value, by)]
    assert resolved.decisions[0].reason


def test_an_open_question_is_refused_with_candidates_and_flags() -> None:
    with pytest.raises(InputError) as caught:
        resolve(CONFIG, [RANGE, SCALE], Choices(), "a family")

    message = str(caught.value)
    for part in ("a family", "--value-range 255 or 1", "--res-scale 0.1 or 1", "--probe IMAGES"):
        assert part in message


def test_an_open_question_can_be_listed_instead() -> None:
    resolved = resolve(CONFIG, [RANGE], Choices(), "a family", strict=False)

    assert [(decision.value, decision.by) for decision in resolved.decisions] == [(None, "open")]


def test_a_probe_that_does_not_tell_is_refused_with_its_figures() -> None:
    with pytest.raises(InputError, match=r"--value-range 255: 41.00 dB, --value-range 1: 40.90 dB"):
        resolve(CONFIG, [RANGE], Choices(), "a family", ranked(41.0, 40.9))


def test_a_probe_answers_only_what_it_tells() -> None:
    """The range makes 20 dB of difference, the factor none: the range is taken, the factor stays open."""
    with pytest.raises(InputError, match="the factor") as caught:
        resolve(CONFIG, [RANGE, SCALE], Choices(), "a family", ranked(40.0, 40.1, 20.0, 20.1))

    assert "the range" not in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "choices", "message"),
    [
        pytest.param(
            [replace(RANGE, answer=METADATA)],
            {"value_range": 255.0},
            "--value-range 255 contradicts the file's metadata .rgb_range is 1",
            id="metadata",
        ),
        pytest.param([], {"res_scale": 0.5}, "--res-scale 0.5 contradicts a family, which has 1", id="fixed"),
        pytest.param([], {"layer_scale": 0.5}, "--layer-scale does not apply to a family", id="foreign"),
        pytest.param([], {"activation": "gelu"}, "--activation gelu contradicts a family, which has relu", id="name"),
        pytest.param([], {"colours": "bgr"}, "--colours does not apply to a family", id="one channel"),
        pytest.param(
            [replace(SCALE, any_value=False)], {"res_scale": 0.5}, "--res-scale 0.5; expected 0.1 or 1", id="candidate"
        ),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(
    questions: list[Question], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(CONFIG, questions, Choices(**choices), "a family")


def test_flags_that_state_what_is_so_anyway_are_accepted() -> None:
    resolved = resolve(CONFIG, [], Choices(res_scale=1.0, activation="relu", colours="rgb"), "a family")

    assert resolved.config == CONFIG


@pytest.mark.parametrize(
    "choices",
    [
        {"value_range": 2.0},
        {"activation": "tanh"},
        {"colours": "yuv"},
        {"res_scale": float("nan")},
        {"res_scale": 0.0},
        {"layer_scale": -1.0},
    ],
    ids=str,
)
def test_choices_outside_the_vocabulary_are_refused(choices: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Choices(**choices)


def nearest_upscaler(shift: float) -> tuple[RcanConfig, dict[str, torch.Tensor]]:
    """Return a x2 network without body that repeats every pixel and adds `shift` on its own range."""
    config = replace(CONFIG, features=3, mean_shift="constant", mean=(0.4, 0.4, 0.4), value_range=1.0)
    state = {name: torch.zeros_like(tensor) for name, tensor in Rcan(config).state_dict().items()}
    for channel in range(3):
        state["first.weight"][channel, channel, 1, 1] = 1.0
        state["upsampler.0.convolution.weight"][4 * channel : 4 * channel + 4, channel, 1, 1] = 1.0
        state["last.weight"][channel, channel, 1, 1] = 1.0
    state["last.bias"][:] = shift
    return config, state


def lornatang_file(path: Path, shift: float) -> Path:
    config, state = nearest_upscaler(shift)
    names = source_names(LORNATANG, config)
    torch.save({names[name]: state[name] for name in names} | {"mean": torch.full((1, 3, 1, 1), 0.4)}, path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[0:48, 0:40]
    waves = [127 + 100 * np.sin(rows / 7 + shift) * np.cos(columns / 9) for shift in (0, 1, 2)]
    path = tmp_path / "photo.png"
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(path)
    return path


def test_probing_finds_the_range_that_keeps_the_image(tmp_path: Path, photo: Path) -> None:
    """An offset of 0.2 is invisible inside a 0..255 network and a fifth of the range inside a 0..1 one."""
    path = lornatang_file(tmp_path / "bare.pth", shift=0.2)
    with pytest.raises(InputError, match="--value-range 255 or 1"):
        load_checkpoint(path)

    loaded = load_checkpoint(path, probe_images=[photo])

    decision = loaded.evidence.decisions[0]
    assert (decision.choice, decision.value, decision.by) == ("value_range", 255.0, "probe")
    assert [entry.values["value_range"] for entry in loaded.evidence.ranking] == [255.0, 1.0]
    assert loaded.evidence.ranking[0].psnr_db > loaded.evidence.ranking[1].psnr_db + 10
    assert loaded.spec.value_range == 255.0


def test_probing_does_not_pretend(tmp_path: Path, photo: Path) -> None:
    """Without an offset both ranges compute the same."""
    path = lornatang_file(tmp_path / "bare.pth", shift=0.0)

    with pytest.raises(InputError, match="the probe images do not decide it"):
        load_checkpoint(path, probe_images=[photo])


def test_probe_images_must_be_large_enough(tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.png"
    Image.new("RGB", (15, 40)).save(tiny)

    with pytest.raises(UsageError, match=r"tiny.png is 15x40; expected at least 16x16"):
        load_checkpoint(lornatang_file(tmp_path / "bare.pth", 0.2), probe_images=[tiny])


def test_probing_trained_weights(tmp_path: Path) -> None:
    """A trained 0..1 network in a layout whose files are ambiguous, and the same network brought to 0..255 inside."""
    trained = load_checkpoint(EXAMPLES / "rcan_x2_demo.pt")
    assert isinstance(trained.config, RcanConfig)
    config = replace(trained.config, mean_shift="constant", mean=(0.0, 0.0, 0.0))
    names = source_names(LORNATANG, config)
    state = trained.network.state_dict()
    large = {
        name: tensor * 255 if name.endswith("bias") and "gate" not in name else tensor for name, tensor in state.items()
    }
    large |= {name: tensor / 255 for name, tensor in state.items() if name.endswith("gate.squeeze.weight")}
    images = [EXAMPLES / "photos" / "evaluation" / name for name in ("cat.png", "coffee.png")]

    for tensors, expected in ((state, 1.0), (large, 255.0)):
        path = tmp_path / f"range{expected:g}.pth"
        torch.save({names[name]: tensors[name] for name in names} | {"mean": torch.zeros(1, 3, 1, 1)}, path)
        loaded = load_checkpoint(path, probe_images=images)

        assert loaded.spec.value_range == expected
        assert loaded.evidence.ranking[0].psnr_db > 35
