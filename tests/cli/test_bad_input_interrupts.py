"""Ctrl-C at every stage: exit code 130, one line, the previous artifact intact and nothing half-written beside it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.core.imaging.read import read_image

VERBS = {
    "export": ("export", "good.pt", "-o", "OUT/model.onnx"),
    "quantize int8": (
        "quantize", "good.onnx", "--precision", "int8", "--images", "photos", "--crops", "4", "--crop-size", "16",
        "-o", "OUT/model.onnx",
    ),
    "compress": (
        "compress", "good.onnx", "--images", "photos", "--target", "tensorrt", "--max-psnr-drop", "3",
        "-o", "OUT/model.onnx",
    ),
    "build openvino": ("build", "good.onnx", "--engine", "openvino", "--no-cache", "-o", "OUT/model.engine"),
    "verify": ("verify", "good.engine", "--against", "good.pt", "--images", "photo.png", "--report", "OUT/report"),
    "upscale folder": ("upscale", "good.engine", "photos", "-o", "OUT/large"),
    "deploy": ("deploy", "good.pt", "--images", "photos", "--engine", "onnxruntime", "-o", "OUT/model.srd"),
}  # fmt: skip
STAGES = 3
"""Moments tried per verb: each is the begin of a task that reports progress. Some have more, which cost minutes."""


def filled(verb: str, workshop: Path, out: Path) -> list[str]:
    made = []
    for word in VERBS[verb]:
        if word.startswith("OUT/"):
            made.append(str(out / word.removeprefix("OUT/")))
        else:
            made.append(str(workshop / word) if (workshop / word).exists() else word)
    return made


# Runs one verb again and again in a process of its own, and sends SIGINT to itself when task 1, 2, 3, ... begins.
INTERRUPTING = """
import contextlib, io, json, signal, sys
from srdeploy.cli.console import RichProgress
from srdeploy.cli.main import run

commands = json.loads(sys.argv[1])
task = RichProgress.task
begun = 0
interrupted_at = 0

@contextlib.contextmanager
def counted(self, description, total=None):
    global begun
    with task(self, description, total) as advance:
        begun += 1
        if begun == interrupted_at:
            signal.raise_signal(signal.SIGINT)
        yield advance

RichProgress.task = counted
outcomes = []
for interrupted_at, command in enumerate(commands, start=1):
    begun = 0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run(command)
    outcomes.append([code, [line for line in stderr.getvalue().splitlines() if line.startswith("error:")]])
    if code == 0:
        break
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_at_each_stage_leaves_what_was_there(workshop: Path, tmp_path: Path, verb: str) -> None:
    folders = [tmp_path / str(stage) for stage in range(1, STAGES + 1)]
    before = [previous(verb, workshop, folder) for folder in folders]
    commands = [[*filled(verb, workshop, folder), "--force"] for folder in folders]

    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTING, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    interrupted = [outcome for outcome in outcomes if outcome[0] != 0]
    assert interrupted == [[130, ["error: interrupted; nothing was left half-written"]]] * len(interrupted)
    assert len(interrupted) > 0
    assert [content(folder) for folder in folders[: len(interrupted)]] == before[: len(interrupted)]


def previous(verb: str, workshop: Path, out: Path) -> dict[str, bytes]:
    """Make an earlier output of the same name."""
    out.mkdir()
    target = Path(filled(verb, workshop, out)[-1])
    if verb in ("deploy", "verify"):
        target.mkdir()
        (target / ("manifest.json" if verb == "deploy" else "report.json")).write_text("precious")
    elif verb != "upscale folder":
        target.write_text("precious")
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes, without journals: an interrupted run of a folder resumes from its own."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".srdeploy" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("export", "exporting"),
        ("quantize int8", "reading images"),
        ("build openvino", "compiling"),
        ("upscale folder", "upscaling"),
    ],
)
def test_a_real_ctrl_c_when_a_line_appears(workshop: Path, tmp_path: Path, verb: str, line: str) -> None:
    """It arrives while the task is at work, at the latest at its end."""
    out = tmp_path / "out"
    before = previous(verb, workshop, out)
    process = started(line, [*filled(verb, workshop, out), "--force"])

    seen = read_until(process, lambda text: line in text)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)

    assert process.returncode == 130, seen + rest
    assert "interrupted; nothing was left half-written" in rest
    if verb == "upscale folder":  # finished pictures stay
        left = [out / name for name in content(out)]
        assert [path for path in left if path.name.startswith(".")] == []
        for path in left:
            read_image(path)
    else:
        assert content(out) == before


# A task that has this description ends only when a signal has come.
ENDLESS = """
import contextlib, signal, sys
from srdeploy.cli.console import RichProgress
from srdeploy.cli.main import main

line = sys.argv.pop(1)
task = RichProgress.task

@contextlib.contextmanager
def endless(self, description, total=None):
    with task(self, description, total) as advance:
        yield advance
        while line in description:
            signal.pause()

RichProgress.task = endless
main()
"""


def started(line: str, arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ENDLESS, line, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_until(process: "subprocess.Popen[str]", found: Callable[[str], bool]) -> str:
    assert process.stderr is not None
    seen = ""
    for text in process.stderr:
        seen += text
        if found(text):
            break
    return seen


IMPORTING = """
import sys, time
from pathlib import Path
from srdeploy.core import interrupts
interrupts.install()
interrupts._WAIT_SECONDS = float(sys.argv[2])
try:
    import slow_module
    time.sleep(60)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", Path(sys.argv[1]).exists())
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_waits_for_the_end_of_an_import_but_only_once(tmp_path: Path, signals: int) -> None:
    """OpenVINO's extension crashes, and TensorRT's says it is broken, when an exception strikes while they load."""
    done = tmp_path / "done"
    pressed = "signal.raise_signal(signal.SIGINT)\n"
    (tmp_path / "slow_module.py").write_text(
        # One second, in which the signal is sent again some twenty times.
        f"import signal, time\n{pressed * signals}for _ in range(100): time.sleep(0.01)\nopen({str(done)!r}, 'w')\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", IMPORTING, done, "0.05" if signals == 1 else "3600"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )

    assert ended.stdout.strip() == f"interrupted {signals == 1}"
