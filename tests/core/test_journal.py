"""Journals survive kills, and several workers may share one."""

from pathlib import Path

import pytest

from srdeploy.core.errors import OutputError
from srdeploy.core.journal import Journal


def test_entries_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "work.jsonl"
    first = Journal(path)
    first.append({"output": "a.png", "state": "started"})
    first.append({"output": "a.png", "state": "done"})

    again = Journal(path)

    assert first.entries == again.entries
    assert [entry["state"] for entry in again.entries] == ["started", "done"]


@pytest.mark.parametrize(
    "rest",
    ['{"output": "b', "[1, 2]\n", "rubbish\n", '"text"\n', "\n\n", "\udcff"],
    ids=["cut", "list", "no JSON", "text", "empty lines", "no UTF-8"],
)
def test_what_is_no_entry_is_ignored_and_spoils_nothing(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    Journal(path).append({"output": "a"})
    with path.open("ab") as stream:
        stream.write(rest.encode(errors="surrogateescape"))

    Journal(path).append({"output": "c"})

    assert [entry["output"] for entry in Journal(path).entries] == ["a", "c"]


def test_replaced_entries_are_the_only_ones(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work.jsonl")
    for name in "abc":
        journal.append({"output": name})

    journal.replace(journal.entries[:1])
    journal.append({"output": "d"})

    assert [entry["output"] for entry in Journal(tmp_path / "work.jsonl").entries] == ["a", "d"]


def test_each_writer_has_a_file_of_its_own_and_reads_all(tmp_path: Path) -> None:
    def journal(name: str) -> Journal:
        return Journal(tmp_path / f"{name}.jsonl", others=lambda: tmp_path.glob("*.jsonl"))

    one, two = journal("one"), journal("two")
    one.append({"output": "a"})
    two.append({"output": "b"})

    assert sorted(entry["output"] for entry in journal("three").entries) == ["a", "b"]
    assert (tmp_path / "one.jsonl").read_text() == '{"output": "a"}\n'


def test_refresh_returns_what_others_added_since_once(tmp_path: Path) -> None:
    one, two = (Journal(tmp_path / name, others=lambda: tmp_path.glob("*.jsonl")) for name in ("1.jsonl", "2.jsonl"))
    one.append({"output": "a"})
    assert [entry["output"] for entry in two.refresh()] == ["a"]
    with one.path.open("a") as stream:
        stream.write('{"output": "b"}\n{"output":')  # half of a line: still being written

    first = two.refresh()
    with one.path.open("a") as stream:
        stream.write(' "c"}\n')
    second = two.refresh()

    assert [entry["output"] for entry in first + second] == ["b", "c"]
    assert two.refresh() == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot write"):
        Journal(tmp_path / "file" / "work.jsonl")


def test_a_disk_without_space_is_an_output_error(small_disk: Path) -> None:
    journal = Journal(small_disk / "work.jsonl")

    with pytest.raises(OutputError, match="no space left"):
        for _ in range(100):
            journal.append({"text": "x" * 10_000})
