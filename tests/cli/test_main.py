"""The frame of the command line: quick help, one error boundary, documented exit codes, one document with --json."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from srdeploy.cli.console import RichProgress, emit_json, error_line, markdown_table, next_command, table, warning_line
from srdeploy.cli.main import VERBS, cli, run
from srdeploy.cli.options import SHAPE
from srdeploy.core import errors

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "onnxscript", "nncf", "matplotlib"}

Verb = Callable[[Callable[..., Any]], None]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Make a function, or a click command, the verb `try`."""

    def register(function: Callable[..., Any]) -> None:
        command = function if isinstance(function, click.Command) else click.command()(function)
        module = types.ModuleType("srdeploy_try")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "srdeploy_try", module)
        monkeypatch.setitem(cli._verbs, "try", ("srdeploy_try", "Try."))

    return register


def python(script: str, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def imported(stderr: str) -> set[str]:
    """Return the top-level packages named by `python -X importtime`."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_imports_nothing_heavy_and_names_every_verb() -> None:
    done = python("from srdeploy.cli.main import main; main(['--help'])", "-X", "importtime")

    assert done.returncode == 0
    assert "click" in imported(done.stderr)
    assert not imported(done.stderr) & (HEAVY | {"numpy"})
    assert [name for name in VERBS if f"\n  {name} " not in done.stdout] == []
    assert "130 interrupted" in done.stdout


def test_the_import_check_would_notice_a_heavy_package() -> None:
    done = python("import onnx", "-X", "importtime")

    assert "onnx" in imported(done.stderr)


def test_help_takes_less_than_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        # Processor time, and the best of five: the question is what the command costs, not what else the machine does.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([Path(sys.executable).with_name("srdeploy"), "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself_with_an_example_and_imports_nothing_heavy(name: str) -> None:
    done = python(f"from srdeploy.cli.main import main; main([{name!r}, '--help'])", "-X", "importtime")

    assert done.returncode == 0, done.stderr[-2000:]
    assert "Example:\n    srdeploy " in done.stdout
    assert not imported(done.stderr) & HEAVY


def test_help_and_version_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-h"]) == 0
    assert run(["--version"]) == 0
    assert "srdeploy, version 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-verb"], "No such command 'no-such-verb'"),
        (["--no-such-option"], "No such option '--no-such-option'"),
        (["try", "--no-such-option"], "No such option"),
        (["try", "--shape", "180x320"], "1x3x180x320"),
        (["try", "--file", "/no/such/file"], "does not exist"),
        (["try"], "Missing option '--file'"),
    ],
    ids=["verb", "option", "verb's option", "shape", "file", "missing"],
)
def test_usage_errors_exit_2_with_the_usage(
    verb: Verb, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    @click.command()
    @click.option("--shape", type=SHAPE)
    @click.option("--file", type=click.Path(exists=True), required=True)
    def command(**options: Any) -> None:
        pytest.fail("must not run")

    verb(command)

    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "Usage: srdeploy" in captured.err


@pytest.mark.parametrize(
    "kind",
    [entry for entry in vars(errors).values() if isinstance(entry, type) and issubclass(entry, errors.SrdeployError)],
    ids=lambda kind: kind.__name__,
)
def test_each_of_our_errors_is_one_line_and_its_code(
    verb: Verb, capsys: pytest.CaptureFixture[str], kind: type[errors.SrdeployError]
) -> None:
    def fail() -> None:
        if kind is errors.MissingExtraError:
            raise errors.MissingExtraError("openvino", "cpu")
        if kind is errors.GpuMemoryError:
            raise errors.GpuMemoryError("[a]")
        raise kind("[a] was found", expected="[b]", next_step="do c")

    verb(fail)

    assert run(["try"]) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    if kind not in (errors.MissingExtraError, errors.GpuMemoryError):
        assert captured.err == "error: [a] was found; expected [b]; do c\n"


def test_a_verb_may_return_an_exit_code(verb: Verb) -> None:
    verb(lambda: 6)

    assert run(["try"]) == 6


SCRIPT = """
    import sys, time, types, click
    from srdeploy.cli import main
    module = types.ModuleType("srdeploy_try")
    @click.command()
    def command():
        {body}
    module.command = command
    sys.modules["srdeploy_try"] = module
    main.cli._verbs["try"] = ("srdeploy_try", "Try.")
    main.main(["try"])
"""


def test_a_bug_shows_its_traceback_and_exits_1() -> None:
    done = python(SCRIPT.format(body="[][0]"))

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "IndexError" in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "error: interrupted; nothing was left half-written"), (signal.SIGTERM, 143, "")],
    ids=["ctrl-c", "terminate"],
)
def test_a_signal_unwinds_and_exits_with_its_code(number: signal.Signals, code: int, words: str) -> None:
    body = "try: print('ready', flush=True); time.sleep(60)\n        finally: print('cleaned', flush=True)"
    script = textwrap.dedent(SCRIPT.format(body=body))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)
    out, err = process.communicate(timeout=120)

    assert process.returncode == code
    assert out == "cleaned\n"
    assert words in err
    assert "Traceback" not in err


def test_a_reader_that_went_away_is_not_an_error() -> None:
    body = "[click.echo('x' * 1000) for _ in range(1000)]"
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT.format(body=body))], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (0, b"")


def test_emitted_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"psnr_db": float("inf"), "nan": float("nan"), "path": Path("a/b"), "list": (1, None, True)})

    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"psnr_db": "inf", "nan": "nan", "path": "a/b", "list": [1, None, True]}
    assert captured.err == ""


def test_tables_are_plain_ascii_off_a_terminal_and_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    table("Engines", ["engine", "ms"], [["[openvino] int8", "9.50"], ["eager", "100.00"]])

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.isascii()
    assert "[openvino] int8" in captured.err
    assert "|   9.50 |" in captured.err


@pytest.mark.parametrize("show", [error_line, warning_line, RichProgress().note, next_command])
def test_names_of_files_neither_steer_the_terminal_nor_end_the_line(
    show: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    show("a\x1b[31m\x07\nb[red].png")

    assert r"a\x1b[31m\x07\nb[red].png" in capsys.readouterr().err


def test_tables_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table("", ["key"], [["a\x1b[31m\x07[red]"]])

    assert r"a\x1b[31m\x07[red]" in capsys.readouterr().err


def test_markdown_escapes_its_separator() -> None:
    assert markdown_table(["a|b"], [["c|d"]]).splitlines()[2] == "| c\\|d |"
