"""A user with a folder of small files, who runs commands, and a record of where each message was made."""

import functools
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from checkpoint_fuzzing.seeds import official_rcan, random_state, torch_file, yjn870_srdensenet
from next_steps.inventory import ROOT, TABLES, Step, steps
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.errors import SrdeployError

SMALL = "--method minmax --equalize 0 --crops 4 --crop-size 16 --whole 1 --threads 1"
"""Options of a calibration that takes a second."""
Message = tuple[str, str]
"""Place ("core/artifact.py:refuse_existing") and text of an error."""


def _place(frame: FrameType | None) -> str:
    """Return the innermost function of the product in which an error is made."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_name != "recording" and path.is_relative_to(ROOT):
            name = frame.f_code.co_qualname.split(".<locals>.<")[0]  # a comprehension belongs to its function
            return f"{path.relative_to(ROOT).as_posix()}:{name}"
        frame = frame.f_back
    return ""


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Every error of the product that was made in a test."""
    made: list[Message] = []
    real = SrdeployError.__init__

    def recording(self: SrdeployError, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        made.append((_place(sys._getframe()), " | ".join(filter(None, (self.next_step, self.expected)))))

    monkeypatch.setattr(SrdeployError, "__init__", recording)
    return made


class User:
    """Types commands in a folder, and reads what they print."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.printed = ""
        self._capsys = capsys

    def types(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit code and everything that it printed."""
        self._capsys.readouterr()
        code = run(shlex.split(command.removeprefix("srdeploy ")))
        captured = self._capsys.readouterr()
        printed = captured.err + captured.out
        self.printed += printed
        return code, printed

    def refused(self, command: str) -> str:
        """Run a command that ends in an error; return its line."""
        code, printed = self.types(command)
        (line,) = (line for line in printed.splitlines() if line.startswith("error:"))
        assert code not in (0, 1), line
        return line

    def runs(self, command: str) -> str:
        """Run a command that succeeds; return what it printed."""
        code, printed = self.types(command)
        assert code == 0, f"{command}\n{printed}"
        return printed

    def next(self, command: str) -> str:
        """Run a command that succeeds; return the command that it prints as the next one."""
        (line,) = (line for line in self.runs(command).splitlines() if line.startswith("next: "))
        return line.removeprefix("next: ")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks and pictures; read them, do not write here."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "good.pt").write_bytes(torch_file(random_state(official_rcan()), legacy=False))
    (folder / "luma.pt").write_bytes(torch_file(random_state(yjn870_srdensenet()), legacy=False))
    (folder / "photos").mkdir()
    for seed in range(4):
        photo(96, 112, seed).save(folder / "photos" / f"{seed}.png")
    photo(20, 24, 9).save(folder / "photo.png")
    assert run(["export", str(folder / "good.pt"), "-o", str(folder / "good.onnx")]) == 0
    fp16 = ("--precision", "fp16", "--target", "openvino", "-o", str(folder / "fp16.onnx"))
    assert run(["quantize", str(folder / "good.onnx"), *fp16]) == 0
    int8 = ("--precision", "int8", "--images", str(folder / "photos"), *SMALL.split(), "-o", str(folder / "int8.onnx"))
    assert run(["quantize", str(folder / "good.onnx"), *int8]) == 0
    return folder


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Return a smooth colorful picture: calibration refuses noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def user(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> User:
    """A user in a folder of their own with copies of the shelf's files."""
    for path in shelf.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return User(tmp_path, capsys)


@pytest.fixture(autouse=True)
def _its_message_was_shown(request: pytest.FixtureRequest, messages: list[Message]) -> Iterator[None]:
    """Fail a test whose message was not made at the place that the test names."""
    user: User | None = request.getfixturevalue("user") if "user" in request.fixturenames else None
    yield
    for mark in request.node.iter_markers("advice"):
        place, part = mark.args
        if place in TABLES:
            assert any(part in text for _, text in messages), f"{place}: {part}\n{messages}"
            continue
        if any(step.kind == "error" and step.place == place and part in step.text for step in _steps()):
            assert any(made == place and part in text for made, text in messages), f"{place}: {part}\n{messages}"
        elif not any(made == place and part in text for made, text in messages):
            assert user is not None
            assert part in user.printed, user.printed


@functools.cache
def _steps() -> tuple[Step, ...]:
    return tuple(steps())
