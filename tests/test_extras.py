"""The extras: what the printed advice installs, run by pip on packages with names and versions only. No network."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from srdeploy.runtime.engines.onnxruntime_gpu import INSTALL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
SOURCES = [path for folder in ("core", "models", "export", "calibration", "runtime", "upscale", "cli")
           for path in (ROOT / folder).rglob("*.py")]  # fmt: skip


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;]", requirement)[0]


def required() -> set[str]:
    return {name_of(entry) for entry in [*PROJECT["dependencies"], *(e for extra in EXTRAS.values() for e in extra)]}


def write_wheel(folder: Path, name: str, version: str, requires: list[str], extras: list[str]) -> None:
    """Write a wheel without files."""
    plain = name.replace("-", "_")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {entry}" for entry in requires]
    info = f"{plain}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: every pinned package, an older TensorRT, and this project with its real requirements."""
    folder = tmp_path_factory.mktemp("index")
    for name, version in [*PINS.items(), ("tensorrt", "10.16.1.11")]:
        extras = {"pyvips": ["binary"]}.get(name, [])
        write_wheel(folder, name, version, [], extras)
    requires = [*PROJECT["dependencies"]]
    requires += [f"{entry}; extra == '{name}'" for name, entries in EXTRAS.items() for entry in entries]
    write_wheel(folder, "srdeploy", PROJECT["version"], requires, list(EXTRAS))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, index: Path) -> dict[str, str]:
    """A new virtual environment in which `pip` finds the wheels and nothing else."""
    tmp_path = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    pip = tmp_path / "venv" / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {tmp_path / "venv" / "bin" / "python"} "$@"\n')
    pip.chmod(0o755)
    return {
        "PATH": f"{pip.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def run(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def advised() -> set[str]:
    """Return the extras that some message of the sources tells people to install."""
    found = set()
    for path in SOURCES:
        text = path.read_text()
        found |= set(re.findall(r"srdeploy\[([a-z-]+)\]", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_extra", "MissingExtraError"):
                found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return found


def test_every_extra_that_is_advised_exists() -> None:
    assert advised() >= {"cpu", "gpu", "video", "report"}
    assert advised() <= set(EXTRAS)


def test_all_requirements_are_pinned_and_nothing_else() -> None:
    assert set(PINS) == required()


def test_the_extras_can_be_combined_at_the_pinned_versions(index: Path, environment: dict[str, str]) -> None:
    together = [name for name in EXTRAS if name != "cpu"]

    output = run(f"pip install --dry-run -c {ROOT / 'constraints.txt'} 'srdeploy[{','.join(together)}]'", environment)

    assert "does not provide the extra" not in output
    installed = output.splitlines()[-1]
    for name in ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "polygraphy", "openvino"):
        assert f" {name.replace('-', '_')}-{PINS[name]}" in installed or f" {name}-{PINS[name]}" in installed
    assert "does not provide the extra 'cuda'" in run("pip install --dry-run 'srdeploy[cuda]'", environment)


def test_the_advice_for_both_onnxruntime_packages_leaves_one(environment: dict[str, str]) -> None:
    run("pip install onnxruntime onnxruntime-gpu", environment)

    run(INSTALL, environment)

    names = {line.split("==")[0] for line in run("pip freeze", environment).splitlines()}
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names
    run("pip install 'tensorrt<11'", environment)
    assert "tensorrt==10.16.1.11" in run("pip freeze", environment)
