"""No next step is forgotten: every one in the source has a test that triggers its message and takes it."""

import ast

from next_steps.inventory import ROOT, Step, steps

ELSEWHERE = "{}"
"""A step that is handed on: its text comes from a table, whose entries are listed one by one."""


def taken() -> set[tuple[str, str]]:
    """Return place and part of every @pytest.mark.advice of the tests."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if "mark.advice(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.advice"):
                place, part = (ast.literal_eval(argument) for argument in node.args)
                found.add((place, part))
    return found


def is_taken(step: Step, by: set[tuple[str, str]]) -> bool:
    """Return True if a mark has the step's place, and its part is one of the step, filled in or not."""
    constant = max(step.text.split("{}"), key=len)
    return any(place == step.place and (part in step.text or constant in part) for place, part in by)


def test_every_next_step_is_taken_in_a_test() -> None:
    marks = taken()

    missing = [step for step in steps() if step.text != ELSEWHERE and not is_taken(step, marks)]

    assert [f"{step.place}: {step.text}" for step in missing] == []


def test_every_test_names_a_next_step_of_the_source() -> None:
    known = steps()

    unknown = {mark for mark in taken() if not any(is_taken(step, {mark}) for step in known)}

    assert unknown == set()


def test_the_inventory_would_notice() -> None:
    """Steps are found in constants, f-strings, both branches of a condition, returned texts and printed commands."""
    found = {step.text for step in steps()}

    assert len(found) > 80
    assert "choose another name, or pass --force to replace it" in found
    assert "add --device {}, or choose another engine" in found
    assert {"free some space", "choose a folder you can write to"} <= found
    assert "raise {} to allow it" in found
    assert "next: srdeploy build" in found
    assert not is_taken(Step("core/artifact.py:new", "error", "try another"), taken())
