"""Every message of the product with a next step, found in its source: what an error's `next_step=` can be, the commands
that verbs print as the next one, and other texts that name an option, a command or a package to install.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srdeploy.cli.main import VERBS

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "export", "calibration", "cli", "runtime", "upscale")
"""models/ has a table of its own: tests/models/checkpoint/test_next_steps.py."""

_ADVICE = re.compile(
    rf"(?<![\w-])--[a-z][a-z-]+|\bsrdeploy ({'|'.join(VERBS)})\b|pip install|`make |name (that )?end(s|ing) in"
    r"|\boutput (ending in|\.)|\.\w+ (or \.\w+ )?output|\bwrite an \."
)
_NOT_SHOWN = {"next_step", "help", "metavar", "epilog"}
_NO_ADVICE = {
    # Arguments of other programs, and why a layer was kept.
    "--format=csv,noheader",
    "asked for with --keep",
    "--device with several names",
    # Only for signed bundles: tests/consumers/test_signing.py.
    "model_signing verify key --public_key key.pub --signature {}/{} {}",
    "--query-gpu={}",
    'echo "{}  $CHECKPOINT" | sha256sum --check --quiet',
}
TABLES = {"runtime/engines/tensorrt/log.py": 3, "runtime/verify/advice.py": 1}
"""Modules whose texts are next steps: every one, or the last of each tuple of three."""


@dataclass(frozen=True)
class Step:
    """One text that a message can end in.

    Attributes:
        place: module and function, such as "core/artifact.py:check_output".
        kind: "error" for a `next_step=`, "next" for the command that a verb prints last, "text" for other messages.
        text: its constant parts, with "{}" for what is filled in; "{}" alone comes from one of the `TABLES`.
    """

    place: str
    kind: str
    text: str


def steps() -> list[Step]:
    """Return every next step of the rooms, in the order of the source."""
    found = [step for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for step in steps_of(path)]
    errors = {step.text for step in found if step.kind == "error"}
    return list(dict.fromkeys(step for step in found if step.kind != "text" or step.text not in errors))


def steps_of(path: Path) -> Iterator[Step]:
    """Yield the next steps of one module."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    if name in TABLES:
        yield from (Step(name, "error", text) for text in _table(module, TABLES[name]))
        return
    names = _assigned(ast.parse((ROOT / "core" / "errors.py").read_text())) | _assigned(module)
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    for function, node in _walk(module, ()):
        place = f"{name}:{'.'.join(function) or '<module>'}"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "next_step":
                    local = names | _assigned(_function_of(module, function))
                    yield from (Step(place, "error", text) for text in _texts(keyword.value, local, functions))
            if ast.unparse(node.func) == "next_command":
                if isinstance(node.args[0], ast.Starred) and _called(node.args[0].value) in functions:
                    for inner in ast.walk(functions[_called(node.args[0].value)]):
                        if isinstance(inner, ast.Return) and isinstance(inner.value, ast.List):
                            returned = " ".join(ast.unparse(each) for each in inner.value.elts)
                            yield Step(place, "next", "next: " + returned.replace("'", ""))
                    continue
                words = " ".join(ast.unparse(each) for each in node.args)
                words = re.sub(r"\*command_line\('(\w+)', \w+\)", r"srdeploy \1", words)
                yield Step(place, "next", "next: " + words.replace("'", ""))
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            yield from (Step(place, "text", text) for text in _texts(node, {}, {}) if _advises(text))


def _table(module: ast.Module, width: int) -> Iterator[str]:
    """Yield the texts of a table: the last of each tuple, or all."""
    for _, node in _walk(module, ()):
        entries = [node] if width == 1 else node.elts[-1:] if isinstance(node, ast.Tuple) else []
        if width == 1 or (isinstance(node, ast.Tuple) and len(node.elts) == width):
            for entry in entries:
                if isinstance(entry, ast.Constant) and isinstance(entry.value, str) and len(entry.value) > 20:
                    yield entry.value


def _advises(text: str) -> bool:
    return bool(_ADVICE.search(text)) and re.fullmatch(r"--?[\w/-]+", text) is None and text not in _NO_ADVICE


def _walk(node: ast.AST, function: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """Yield nodes with the names of the functions and classes around them.

    Docstrings, help texts (their examples are run from the commands themselves), next steps and what an error found
    are omitted.
    """
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            local = ("<locals>",) if isinstance(node, ast.FunctionDef) else ()
            inside = (*function, *local, child.name)
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.keyword) and child.arg in _NOT_SHOWN:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "example")) and child in node.args:
            continue
        yield inside, child
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child, inside)


def _function_of(module: ast.Module, names: tuple[str, ...]) -> ast.AST:
    node: ast.AST = module
    for name in names:
        if name != "<locals>":
            node = next(each for each in ast.walk(node) if getattr(each, "name", None) == name)
    return node


def _assigned(scope: ast.AST) -> dict[str, ast.expr]:
    """Return the expressions that names of a module or function are bound to."""
    return {
        target.id: node.value
        for node in (ast.iter_child_nodes(scope) if isinstance(scope, ast.Module) else ast.walk(scope))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _called(node: ast.expr) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _texts(node: ast.expr, names: dict[str, ast.expr], functions: dict[str, ast.AST]) -> Iterator[str]:
    """Yield each text that an expression can be; a function's are those that it returns."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body, names, functions)
        yield from _texts(node.orelse, names, functions)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value, names, functions)
    elif isinstance(node, ast.Name) and node.id in names:
        yield from _texts(names[node.id], {name: value for name, value in names.items() if name != node.id}, functions)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        for inner in ast.walk(functions[node.func.id]):
            if isinstance(inner, ast.Return) and inner.value is not None:
                yield from _texts(inner.value, names, {})
    elif isinstance(node, ast.JoinedStr):
        yield "".join("{}" if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values)  # type: ignore[attr-defined]
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and node.value:
            yield node.value
    else:
        yield "{}"
