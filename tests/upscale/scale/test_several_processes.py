"""Several processes share a folder without a cluster, and --status reads how far they are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.cli.main import run
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.scale.folder_journal import JOURNALS
from srdeploy.upscale.scale.shards import shard_index

RANDOM = np.random.default_rng(0)
COUNT = 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for index in range(COUNT):
        path = folder / f"sub{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, RANDOM.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def model(nearest_onnx: Callable[..., Path]) -> Path:
    return nearest_onnx()


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "srdeploy.cli.main", "upscale", *map(str, words)]


def pictures(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if JOURNALS not in path.relative_to(folder).parents
    }


def status(capsys: pytest.CaptureFixture[str], output: Path) -> dict[str, object]:
    capsys.readouterr()
    assert run(["upscale", "--status", str(output), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_shards_at_once_are_disjoint_and_complete(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["upscale", str(model), str(source), "-o", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"

    children = [
        subprocess.Popen(
            command(model, source, "-o", out, "--shard", f"{index}/2", "--threads", 1, "--json"),
            stdout=subprocess.PIPE,
        )
        for index in range(2)
    ]
    documents = [json.loads(child.communicate(timeout=120)[0]) for child in children]

    assert [child.returncode for child in children] == [0, 0]
    made = [set(document["made"]) for document in documents]
    assert not made[0] & made[1]
    assert len(made[0] | made[1]) == COUNT
    assert all(shard_index(name, 2) == index for index in range(2) for name in made[index])
    assert pictures(out) == pictures(tmp_path / "whole")
    found = status(capsys, out)
    assert (found["total"], found["done"], found["failed"], found["left"]) == (COUNT, COUNT, {}, [])


def test_status_lists_failures_by_host_and_what_is_left(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = source / "sub0" / "00.png"
    bad.write_bytes(bad.read_bytes()[:100])
    index = shard_index("sub0/00.png", 3)
    out = tmp_path / "out"
    assert run(["upscale", str(model), str(source), "-o", str(out), "--shard", f"{index}/3"]) == 3

    found = status(capsys, out)
    assert run(["upscale", "--status", str(out)]) == 0
    text = capsys.readouterr().err

    host = os.uname().nodename
    assert list(found["failed"]) == ["sub0/00.png"]  # type: ignore[call-overload]
    assert found["failed_by_host"] == {host: 1}
    assert found["done_by_host"] == {host: found["done"]}
    assert found["running"] == []
    assert found["done"] + found["left_count"] + 1 == COUNT  # type: ignore[operator]
    assert set(found["left_by_shard"]) == {f"{each}/3" for each in range(3) if each != index}  # type: ignore[call-overload]
    assert "1 failed" in text
    assert "failed: sub0/00.png: " in text
    assert "attempt 1" in text


def test_failures_disappear_from_the_status_when_they_are_mended(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = source / "sub0" / "00.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    out = tmp_path / "out"
    assert run(["upscale", str(model), str(source), "-o", str(out)]) == 3
    bad.write_bytes(whole)
    assert run(["upscale", str(model), str(source), "-o", str(out)]) == 0
    assert (
        run(["upscale", str(model), str(source), "-o", str(out), "--tile", "8", "--overlap", "0"]) == 2
    )  # all refused
    after_other_settings = status(capsys, out)
    assert run(["upscale", str(model), str(source), "-o", str(out)]) == 0

    assert len(after_other_settings["failed"]) == COUNT  # type: ignore[arg-type]
    found = status(capsys, out)
    assert (found["done"], found["failed"]) == (COUNT, {})


def test_status_without_the_input_folder_counts(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["upscale", str(model), str(source), "-o", str(out), "--shard", "0/2"]) == 0
    source.rename(tmp_path / "moved")

    found = status(capsys, out)

    assert found["left"] is None
    assert found["total"] == COUNT
    assert found["done"] + found["left_count"] == COUNT  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("MODEL", "IN", "-o", "OUT", "--shard", "2/2"), 2, "--shard 2/2; expected I/N"),
        (("MODEL", "IN/sub0/00.png", "-o", "OUT.png", "--shard", "0/2"), 2, "--shard does not apply to an image"),
        (("MODEL", "IN", "-o", "OUT", "--device", "cuda:0,cuda:0"), 2, "different GPUs such as cuda:0,cuda:1"),
        (("MODEL", "IN", "-o", "OUT", "--device", "cpu,cuda:0"), 2, "different GPUs such as cuda:0,cuda:1"),
        (("MODEL", "IN", "-o", "MODEL"), 8, "cannot write"),
        (("MODEL", "IN"), 2, "missing -o"),
        ((), 2, "missing MODEL and SOURCE and -o"),
        (("--status", "IN"), 3, "has no journal of an upscaled folder"),
        (("--status", "NOWHERE"), 3, "has no journal of an upscaled folder"),
    ],
    ids=["shard", "shard of a picture", "GPU twice", "CPU and GPU", "OUT is a file", "no OUT", "nothing", "no journal",
         "no folder"],
)  # fmt: skip
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    code: int,
    message: str,
    source: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "OUT.png": str(tmp_path / "out.png")}
    filled = [places.get(word, word.replace("IN", str(source), 1) if word.startswith("IN") else word) for word in words]

    found = run(["upscale", *filled])

    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert found == code, errors
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_second_run_with_other_settings_waits_its_turn(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts

    out = tmp_path / "out"
    with FolderJournal(out, RunFacts(key="another", source=str(source), suffix=None, total=COUNT)):
        code = run(["upscale", str(model), str(source), "-o", str(out)])

    assert code == 2
    assert "another run with another network or other settings writes into" in capsys.readouterr().err
    assert pictures(out) == {}
