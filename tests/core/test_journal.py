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


def test_each_worker_writes_a_file_of_its_own_and_reads_all(tmp_path: Path) -> None:
    path = tmp_path / ".work.jsonl"
    workers = [Journal(path, worker=name) for name in ("one", "two")]
    for journal, output in zip(workers, "ab", strict=True):
        journal.append({"output": output})
    Journal(path).append({"output": "c"})

    assert sorted(entry["output"] for entry in Journal(path, worker="three").entries) == ["a", "b", "c"]
    assert (tmp_path / ".work.one.jsonl").read_text() == '{"output": "a"}\n'


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot write"):
        Journal(tmp_path / "file" / "work.jsonl")


def test_a_disk_without_space_is_an_output_error(small_disk: Path) -> None:
    journal = Journal(small_disk / "work.jsonl")

    with pytest.raises(OutputError, match="no space left"):
        for _ in range(100):
            journal.append({"text": "x" * 10_000})
