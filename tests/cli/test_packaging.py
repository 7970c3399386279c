"""The wheel holds our packages under their own name and nothing else, and starts with only its light dependencies."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["core", "models", "export", "calibration", "runtime", "upscale", "cli"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, since setuptools writes into the tree it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        output,
        source,
    ]
    subprocess.run(command, check=True, timeout=120)
    (built,) = output.glob("srdeploy-*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_outside_its_name(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]

    assert {name.split("/")[0] for name in names} == {"srdeploy"}
    modules = {name.removeprefix("srdeploy/") for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_every_file_that_modules_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    others = {
        "srdeploy/" + str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        # Other processes write there under temporary names.
        if "__pycache__" not in path.parts and path.is_file() and path.suffix != ".py"
    }

    assert others - names == set()
    assert "srdeploy/core/py.typed" in names


def test_the_installed_wheel_starts_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        site,
        wheel,
    ]
    subprocess.run(install, check=True, timeout=120)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path[:] = [f for f in sys.meta_path "
        "if '__editable__' not in getattr(f, '__module__', '')]; import srdeploy.cli.main as m; print(m.__file__); "
        "m.main(['--version'])"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "srdeploy" / "cli" / "main.py")
    assert "srdeploy, version" in done.stdout
