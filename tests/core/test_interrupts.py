"""Signals are handled in one module."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "models", "export", "calibration", "runtime", "upscale", "cli")


def test_no_other_module_sets_a_handler() -> None:
    handlers = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bsignal\.signal\(", path.read_text(encoding="utf-8"))
    }

    assert handlers == {"core/interrupts.py"}
