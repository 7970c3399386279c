"""Errors are one line with what was found, what was expected and what to do; their codes are the documented ones."""

import re

import pytest

from srdeploy.core import errors
from srdeploy.core.errors import InputError, MissingExtraError, SrdeployError, UsageError
from srdeploy.core.extras import import_extra, is_installed

CODES = {
    "UsageError": 2,
    "PrecisionError": 2,
    "InputError": 3,
    "ExportError": 4,
    "BuildError": 5,
    "GateError": 6,
    "UnstableError": 7,
    "CapabilityError": 8,
    "GpuMemoryError": 8,
    "MissingExtraError": 8,
    "OutputError": 8,
}


def test_the_codes_are_the_documented_ones() -> None:
    found = {
        name: entry.exit_code
        for name, entry in vars(errors).items()
        if isinstance(entry, type) and issubclass(entry, SrdeployError) and entry is not SrdeployError
    }

    assert found == CODES


def test_the_drawn_tree_names_every_class() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)

    assert set(drawn) == set(CODES)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "a is odd"),
        ({"expected": "b"}, "a is odd; expected b"),
        ({"next_step": "do c"}, "a is odd; do c"),
        ({"expected": "b", "next_step": "do c"}, "a is odd; expected b; do c"),
    ],
    ids=["found", "expected", "next", "all"],
)
def test_a_message_is_found_expected_next(arguments: dict[str, str], line: str) -> None:
    assert str(InputError("a is odd", **arguments)) == line


def test_a_message_is_one_line_whatever_came_in() -> None:
    assert str(UsageError("two\nlines\tand   blanks")) == "two lines and blanks"


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'srdeploy\[cpu\]'") as caught:
        import_extra("no_such_package_zq.submodule", "cpu")

    assert caught.value.exit_code == 8
    assert not is_installed("no_such_package_zq")


def test_an_installed_package_is_imported_and_its_own_failure_is_not_hidden(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("site")
    (folder / "broken_zq.py").write_text("import another_missing_zq\n")
    monkeypatch.syspath_prepend(str(folder))

    assert import_extra("json.decoder", "cpu").__name__ == "json.decoder"
    with pytest.raises(ModuleNotFoundError, match="another_missing_zq"):
        import_extra("broken_zq", "cpu")
