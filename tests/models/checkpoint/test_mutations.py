"""A short slice of `make fuzz`: damaged checkpoints give success or one of our errors, never anything else."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoint_fuzzing.mutations import mutated
from checkpoint_fuzzing.seeds import SEEDS

from srdeploy.models.checkpoint.load import load_checkpoint

FUZZER = Path(__file__).parents[2] / "fuzz" / "fuzz_checkpoints.py"
COUNT = 240


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fuzz_checkpoints", FUZZER)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_slice_of_the_mutations_meets_only_success_or_our_errors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FUZZER, "--count", str(COUNT), "--workers", "1", "--keep", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["cases"] == COUNT
    assert summary["FAILED"] == 0
    assert summary["loaded"] > 0  # the mutations are not all hopeless
    assert summary["refused"] > 0


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_themselves_load(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SEEDS[name]())

    assert load_checkpoint(path).sha256


def test_cases_follow_from_their_number_alone() -> None:
    data = SEEDS["official_rcan.zip.pt"]()

    first = [mutated(data, data, random.Random(f"0:{number}")) for number in range(20)]
    again = [mutated(data, data, random.Random(f"0:{number}")) for number in range(20)]

    assert first == again
    assert len({content for _, content in first}) > 15


@pytest.mark.parametrize(
    ("error", "reported"),
    [(ValueError("a bug"), "a bug"), (MemoryError(), "more than 1 GB"), (SystemExit(3), "SystemExit")],
    ids=["bug", "memory", "exit"],
)
def test_the_fuzzer_reports_what_it_must(
    fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, reported: str
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(fuzzer, "load_checkpoint", fail)

    outcome = fuzzer.run_case(tmp_path / "x")

    assert outcome.startswith("FAILED")
    assert reported in outcome


def test_the_fuzzer_ends_a_case_that_hangs(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(path: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzzer, "load_checkpoint", hang)
    monkeypatch.setattr(fuzzer, "SECONDS_PER_CASE", 0.1)

    assert fuzzer.run_case(tmp_path / "x") == "FAILED: took more than 0.1 s of processor time"
