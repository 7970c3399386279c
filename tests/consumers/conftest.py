"""Other programs, each in an environment of its own that `make test-consumers` makes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "consumers"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(name: str) -> Path:
    """Return the folder of an environment's programs; skip the test where it was not made."""
    programs = ENVIRONMENTS / name / "bin"
    if not (programs / "python").exists():
        message = f"{programs} does not exist; make it with: make test-consumers"
        if os.environ.get("SRDEPLOY_TEST_CONSUMERS") == "all":
            pytest.fail(message)
        pytest.skip(message)
    return programs


@pytest.fixture
def packages() -> Run:
    """Run a program of the environment of packages from PyPI: its name, then its arguments."""
    programs = environment("packages")

    def run(program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [programs / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run
