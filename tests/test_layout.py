"""The layout keeps its promises: import direction, packaging, no stray modules, types for everybody."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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


def modules() -> dict[str, ast.Module]:
    """Parse every module of the packages, by its import name."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            name = "srdeploy." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module imports, inside functions too, but not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_extra":
            yield from (word.value for word in node.args[:1] if isinstance(word, ast.Constant))
        yield from imports(node)


def import_circle(parsed: dict[str, ast.Module]) -> list[str]:
    """Return the modules of one circle of imports, empty when there is none."""
    graph: dict[str, set[str]] = {}
    for name, tree in parsed.items():
        # `from package import thing` is an import of the module `package.thing` if there is one, else of `package`.
        targets = {target if target in parsed else target.rpartition(".")[0] for target in imports(tree)}
        graph[name] = targets & set(parsed) - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_circle() -> None:
    assert import_circle(modules()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from srdeploy.core import files", True),
        ("def later():\n    from srdeploy.core.files import write", True),
        ("if TYPE_CHECKING:\n    from srdeploy.core.files import write", False),
    ],
    ids=["at the top", "in a function", "for types alone"],
)
def test_a_circle_would_be_found(line: str, found: bool) -> None:
    parsed = {
        "srdeploy.core": ast.parse(""),
        "srdeploy.core.files": ast.parse("import srdeploy.core.shapes"),
        "srdeploy.core.shapes": ast.parse(line),
    }

    assert bool(import_circle(parsed)) == found


IMPORT_NAMES = {"PIL": "pillow", "skimage": "scikit-image"}
"""Import names that are not the distribution's, apart from "-" and "_"."""
PROVIDED = {"triton_python_backend_utils"}
"""Modules of the program that imports ours: Triton's Python backend."""


def test_every_third_party_import_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    required = [*PROJECT["project"]["dependencies"], *(entry for extra in extras for entry in extra)]
    declared = {re.split(r"[\[<>=]", entry)[0] for entry in required}
    imported = {name.partition(".")[0] for tree in modules().values() for name in imports(tree)}
    third_party = imported - set(sys.stdlib_module_names) - {"srdeploy"} - PROVIDED

    assert {"onnx_ir", "ml_dtypes", "openvino"} <= third_party
    assert {IMPORT_NAMES.get(name, name.replace("_", "-")) for name in third_party} - declared == set()
