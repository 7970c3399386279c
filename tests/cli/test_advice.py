"""What messages advise exists: commands parse, and options, extras and pages are there.

tests/next_steps takes every next step.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

from srdeploy.cli.main import VERBS, cli

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "models", "export", "calibration", "runtime", "upscale", "cli")

VERBS_OF = {
    # Where a message is raised, and the verbs that show it. An option that it names belongs to one of them.
    "core": set(VERBS),
    "models": {"inspect", "export", "verify", "bench", "deploy"},
    "export": {"export", "deploy"},
    "calibration": {"quantize", "deploy"},
    "runtime/verify": {"verify", "deploy"},
    "runtime/bench": {"bench", "deploy"},
    "runtime/report": {"report", "verify", "bench", "deploy"},
    "runtime/engines": {"build", "verify", "bench", "upscale", "deploy"},
    "runtime/package": {"package"},
    "runtime": {"upscale", "inspect", "deploy"},
    "upscale": {"upscale"},
    "cli": set(VERBS),
}
NOT_OURS = {"--force-reinstall", "--index-url", "--no-deps", "--query-gpu", "--format", "--head", "--address"}
"""Options of pip, nvidia-smi and ray."""
OTHER_PROGRAMS = re.compile(r"\b(polygraphy|sha256sum|model_signing)\b.*", re.DOTALL)


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string in a module that is not a docstring; "{...}" stands for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # a docstring
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)} - {id(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (
                "{" + ast.unparse(part.value) + "}" if isinstance(part, ast.FormattedValue) else ast.literal_eval(part)
                for part in node.values
            )
            yield node.lineno, "".join(parts)


def messages() -> list[tuple[str, str]]:
    """Return place ("runtime/bundle.py:184") and text of every string of the product."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            found += [(f"{place}:{line}", text) for line, text in literals(path)]
    return found


MESSAGES = messages()
COMMAND = re.compile(r"\bsrdeploy (?P<verb>[a-z]+)(?P<rest>(?: +(?:\S+))*)")


def command_of(verb: str) -> click.Command:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return command


def options_of(verb: str) -> set[str]:
    command = command_of(verb)
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        option
        for each in commands
        for parameter in each.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}


def verbs_for(place: str, text: str) -> set[str]:
    """Return the verbs that show a message, and those that it names."""
    folder = next(name for name in sorted(VERBS_OF, key=len, reverse=True) if place.startswith(name + "/"))
    named = {verb for verb in VERBS if re.search(rf"\b{verb}\b", text)}
    return VERBS_OF[folder] | named


def test_every_option_in_a_message_exists_where_the_message_is_shown() -> None:
    unknown = []
    for place, text in MESSAGES:
        if text.startswith("--") and " " not in text:  # a declaration, or an argument of another program
            continue
        allowed = set().union(*(options_of(verb) for verb in verbs_for(place, text))) | NOT_OURS
        named = re.findall(r"(?<![\w{-])--[a-z][a-z0-9-]+", OTHER_PROGRAMS.sub("", re.sub(r"\{[^}]*\}", " ", text)))
        unknown += [f"{place}: {option} in {text!r}" for option in named if option not in allowed]

    assert unknown == []


def test_every_command_in_a_message_names_a_verb_and_options_of_it() -> None:
    wrong = []
    for place, text in MESSAGES:
        for found in COMMAND.finditer(text):
            verb = found["verb"]
            command = re.split(r"[;,)`]", found["rest"])[0]
            if verb in VERBS:
                named = re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", command)
                wrong += [f"{place}: {verb} {option}" for option in named if option not in options_of(verb)]
            elif "--" in command or re.search(rf"(?:with|run|try):? {re.escape(found[0])}", text):
                wrong.append(f"{place}: {found[0]}")

    assert wrong == []


def test_every_extra_page_and_target_in_a_message_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    wrong = []
    for place, text in MESSAGES:
        given = [name for group in re.findall(r"srdeploy\[([^\]{]*)\]", text) for name in group.split(",")]
        wrong += [f"{place}: extra {name}" for name in given if name not in extras]
        wrong += [f"{place}: {page}" for page in re.findall(r"docs/\S+?\.md", text) if not (ROOT / page).exists()]
        targets = re.findall(r"`make ([a-z-]+)`", text)
        wrong += [f"{place}: make {name}" for name in targets if f"\n{name}:" not in makefile]

    assert wrong == []


def test_the_checks_would_notice() -> None:
    """The scan sees advice in f-strings and tables, and options that no verb has."""
    texts = [text for _, text in MESSAGES]

    assert any(text.startswith("build one with: srdeploy build {path}") for text in texts)
    assert any("--bisect" in text for text in texts)
    assert "--no-such-option" not in options_of("verify")
    assert len([text for text in texts if COMMAND.search(text)]) > 30


def test_pip_understands_the_advised_extras() -> None:
    """The name and extras of `pip install 'srdeploy[...]'` are read as such; nothing is installed."""
    found = {group for _, text in MESSAGES for group in re.findall(r"pip install '(srdeploy\[[^'{]*\])'", text)}

    for requirement in found:
        subprocess.run(
            ["python3", "-c", f"from pip._vendor.packaging.requirements import Requirement as R; R({requirement!r})"],
            check=True,
        )
    assert found
