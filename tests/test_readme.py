"""The README keeps its word: its commands run, its links lead somewhere, its tables name what there is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from srdeploy.cli.main import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

SMALLER = {"deploy": ["--size", "24x32", "--engine", "onnxruntime"], "bench": ["--seconds", "0.5", "--allow-unstable"]}
"""What is added to a verb's command so that it takes seconds; everything else runs as it is printed."""
REPLACED = {"1x3x180x320": "1x3x24x32"}


def shell_blocks(text: str) -> list[list[str]]:
    """Return the commands of every fenced `sh` block, comments removed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [[line for line in block.splitlines() if shlex.split(line, comments=True)] for block in blocks]


def cut_photos(source: Path, target: Path) -> None:
    """Cut a piece out of every photograph: enough to calibrate a test with."""
    target.mkdir()
    for photo in source.glob("*.png"):
        with Image.open(photo) as picture:
            picture.crop((60, 60, 132, 132)).save(target / photo.name)


def test_the_commands_of_the_road_run_in_their_order(tmp_path: Path) -> None:
    commands = [line for block in shell_blocks(README) for line in block if line.startswith("srdeploy ")]
    shutil.copy(ROOT / "examples" / "rcan_x2_demo.pt", tmp_path / "rcan_x4.pt")
    cut_photos(ROOT / "examples" / "photos" / "calibration", tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "cup.png", tmp_path / "photo.png")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SRDEPLOY_CACHE_DIR": str(tmp_path / "cache")}

    for line in commands:
        words = [REPLACED.get(word, word) for word in shlex.split(line, comments=True)]
        words += SMALLER.get(words[1], [])
        # A second picture of the same name is a new user's second step: let it be replaced.
        words += ["--force"] if words[1] == "upscale" else []
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stderr}"

    assert {shlex.split(line)[1] for line in commands} >= {"deploy", "export", "quantize", "build", "verify", "bench"}
    assert (tmp_path / "photo_x4.png").exists()
    assert (tmp_path / "rcan_x4.srd" / "report" / "report.html").exists()


def test_the_python_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / "examples" / "rcan_x2_demo.pt", tmp_path / "rcan.pt")
    export = [sys.executable, "-m", "srdeploy.cli.main", "export", "rcan.pt", "-o", "model.onnx"]
    subprocess.run(export, cwd=tmp_path, check=True, capture_output=True)
    script = block.replace("rcan_x4.srd", "model.onnx") + "\nprint(large.shape)\n"

    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)

    assert done.stdout == "(240, 320, 3)\n", done.stderr


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))

    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)

    assert {"demo", "test"} <= targets


def test_the_tables_name_every_verb_and_every_extra() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert set(rows) == set(VERBS) | set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))

    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]

    assert broken == []


def test_the_manual_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")

    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index]

    assert missing == []
