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

from srdeploy.cli.main import VERBS, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GPU = "## On an NVIDIA GPU"
EXCEPT_GPU = README[: README.index(GPU)] + README[README.index("## From Python") :]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("examples/photos/*.md")]
)

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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the README were run in their order, but for those that need a GPU."""
    folder = tmp_path_factory.mktemp("readme")
    commands = [line for block in shell_blocks(EXCEPT_GPU) for line in block if line.startswith("srdeploy ")]
    shutil.copy(ROOT / "examples" / "rcan_x2_demo.pt", folder / "rcan_x4.pt")
    cut_photos(ROOT / "examples" / "photos" / "calibration", folder / "photos")
    shutil.copy(folder / "photos" / "cup.png", folder / "photo.png")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SRDEPLOY_CACHE_DIR": str(folder / "cache")}
    for line in commands:
        words = [REPLACED.get(word, word) for word in shlex.split(line, comments=True)]
        words += SMALLER.get(words[1], [])
        # A second picture of the same name is a new user's second step: let it be replaced.
        words += ["--force"] if words[1] == "upscale" else []
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert {shlex.split(line)[1] for line in commands} >= {"deploy", "export", "quantize", "build", "verify", "bench"}
    return folder


def test_the_commands_run_in_their_order(workplace: Path) -> None:
    assert (workplace / "photo_x4.png").exists()
    assert (workplace / "rcan_x4.srd" / "report" / "report.html").exists()


def test_the_section_about_gpus_is_short_and_its_commands_exist() -> None:
    section = README[README.index(GPU) : README.index("## From Python")]
    commands = [shlex.split(line, comments=True) for block in shell_blocks(section) for line in block]

    assert len(section.strip().splitlines()) <= 15
    assert [words[1] for words in commands if words[0] == "srdeploy"] == ["doctor", "deploy"]
    with pytest.raises(SystemExit) as ended:  # the options are known: only the file is missing
        cli.main([*commands[-1][1:], "--device", "cuda:1"], prog_name="srdeploy")
    assert ended.value.code == 2


def test_two_engines_are_compared_and_timed_in_fifteen_lines(workplace: Path) -> None:
    compare, _ = python_blocks()
    assert len([line for line in compare.splitlines() if line]) <= 15

    done = run_python(compare.replace("180, 320", "24, 32"), workplace)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"openvino int8: at least [0-9.]+ dB", lines[0])
    assert len(lines) == 5, done.stdout
    row = r"openvino (fp32|int8), (compute|end-to-end): [0-9.]+x, [0-9.]+ to [0-9.]+, [0-9.e+]+ ms( ±[0-9]+ %)?"
    assert all(re.fullmatch(row, line) for line in lines[1:]), done.stdout


def test_the_upscaling_example_runs(workplace: Path) -> None:
    _, upscale = python_blocks()

    done = run_python(upscale + "\nprint(large.shape)\n", workplace)

    assert done.stdout == "(240, 320, 3)\n", done.stderr


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_python(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


def test_nothing_is_quick() -> None:
    assert re.findall(r"\bquick\w*", README) == []


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


def test_the_names_on_the_page_about_the_code_are_in_the_files_that_they_link_to() -> None:
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`,?\s+\(?\[[\w.]+\]\(\.\./([\w/.]+)\)", page)

    missing = [
        f"{name} in {path}"
        for name, path in named
        if not re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]

    assert missing == []
    assert len(named) > 30
    assert len(page.splitlines()) <= 100


def test_the_manual_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")

    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index]

    assert missing == []
