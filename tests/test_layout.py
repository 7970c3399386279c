"""The layout keeps its promises: import direction, packaging, no stray modules, types for everybody."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["core", "models", "export", "calibration", "runtime", "upscale", "cli"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lint_imports(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the import contract on the packages under `folder`/srdeploy."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "srdeploy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_import_contract_holds(copy: Path) -> None:
    done = lint_imports(copy)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("runtime", "import srdeploy.export"),
        ("export", "from srdeploy.calibration import __doc__"),
        ("core", "def later():\n    import srdeploy.models"),
        ("models", "import srdeploy.cli"),
    ],
    ids=["stage to stage", "stage to another", "core upwards, hidden in a function", "to the command line"],
)
def test_the_import_contract_refuses(copy: Path, module: str, line: str) -> None:
    (copy / "srdeploy" / module / "extra_zq.py").write_text(line + "\n")

    done = lint_imports(copy)

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"srdeploy.{module}" in done.stdout


def test_every_package_is_listed_and_mapped_to_its_root_folder() -> None:
    found = {
        "srdeploy." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]

    assert sorted(listed) == sorted(found)
    assert {name: "srdeploy." + path.replace("/", ".") for name, path in mapped.items()} == {n: n for n in listed}


def test_every_package_says_that_it_is_typed() -> None:
    missing = [
        name
        for name in PROJECT["tool"]["setuptools"]["package-dir"].values()
        if not (ROOT / name / "py.typed").exists()
    ]

    assert missing == []


def test_there_is_no_srdeploy_folder_to_shadow_the_mapping() -> None:
    assert not (ROOT / "srdeploy").exists()


def test_constraints_pin_versions_that_the_project_admits() -> None:
    pins = re.findall(r"^([a-z-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"].values()
    required = [*PROJECT["project"]["dependencies"], *(entry for extra in extras for entry in extra)]
    names = {re.split(r"[\[<>=]", entry)[0] for entry in required}

    assert ("torch", "2.13.0") in pins
    assert {name for name, _ in pins} - names <= {"onnx-ir"}
