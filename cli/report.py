"""srdeploy report: write the page of a report again, or compare two reports."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from srdeploy.cli.console import console, emit_json, markdown_table, next_command, table
from srdeploy.cli.options import (
    EXISTING,
    FORCE,
    JSON,
    OUTPUT_PATH,
    argument,
    arguments,
    example,
    option,
    refuse_two_documents,
    verb,
)
from srdeploy.core.errors import GateError, UsageError

if TYPE_CHECKING:
    from srdeploy.runtime.report.compare import Change

EXAMPLE = example(
    """
srdeploy report rcan_x4.srd -o page/
srdeploy report --compare main/report.json branch/report.json --max-slower 10
"""
)

HEADERS = ("engine", "figure", "before", "after", "change", "verdict")


@arguments
class ReportOptions:
    """What `srdeploy report` is given."""

    reports: tuple[Path, ...] = argument(type=EXISTING, metavar="REPORT...", default=(), many=True)
    compare: bool = option("--compare", default=False, help="Compare two reports; a regression ends with exit code 6.")
    max_slower: float = option(
        "--max-slower", type=float, default=10.0, show_default=True, metavar="%", help="Allowed rise of a median."
    )
    max_fidelity_loss: float = option(
        "--max-fidelity-loss", type=float, default=0.5, show_default=True, metavar="DB", help="Allowed loss."
    )
    max_psnr_loss: float = option(
        "--max-psnr-loss", type=float, default=0.01, show_default=True, metavar="DB", help="Allowed loss."
    )
    max_larger: float = option(
        "--max-larger", type=float, default=5.0, show_default=True, metavar="%", help="Allowed growth."
    )
    max_memory: float = option(
        "--max-memory", type=float, default=25.0, show_default=True, metavar="%", help="Allowed growth of memory."
    )
    schema: bool = option("--schema", default=False, help="Print the JSON schema of report.json and exit.")
    markdown: bool = option("--markdown", default=False, help="Print the comparison as Markdown on stdout.")
    output: Path | None = option(
        "-o", "--output", type=OUTPUT_PATH, default=None, help="Folder for the page that is written again."
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(ReportOptions, epilog=EXAMPLE)
def command(options: ReportOptions) -> None:
    """Work with reports: REPORT is a report.json, a folder with it, or a bundle.

    With --compare, the second report is compared with the first, engine by engine: worse by more than a tolerance, a
    gate newly missed or an engine missing is a regression.
    """
    from srdeploy.runtime.report.write import schema

    reports, compare = options.reports, options.compare
    refuse_two_documents(as_json=options.as_json, markdown=options.markdown)
    if options.schema:
        emit_json(schema())
        return
    if len(reports) != (2 if compare else 1):
        raise UsageError(
            f"{len(reports)} reports" + (" for --compare" if compare else ""),
            expected="two: before and after" if compare else "one, and -o FOLDER",
        )
    if compare:
        _compare(options)
    else:
        _write_again(options)


def _compare(options: ReportOptions) -> None:
    from srdeploy.runtime.report.compare import Tolerances, compare
    from srdeploy.runtime.report.write import read_report

    tolerances = Tolerances(
        fidelity_db=options.max_fidelity_loss,
        psnr_db=options.max_psnr_loss,
        latency=options.max_slower / 100.0,
        size=options.max_larger / 100.0,
        memory=options.max_memory / 100.0,
    )
    reports = options.reports
    comparison = compare(read_report(reports[0]), read_report(reports[1]), tolerances)
    rows = [
        (change.engine, change.what, change.before, change.after, change.change, "WORSE" if change.regression else "ok")
        for change in comparison.changes
    ]
    if options.as_json:
        emit_json(comparison.to_json())
    elif options.markdown:
        click.echo(markdown_table(HEADERS, rows))
    else:
        table(f"{reports[0]} and {reports[1]}", HEADERS, rows)
    if comparison.regressions:
        first = comparison.regressions[0]
        more = len(comparison.regressions) - 1
        raise GateError(
            f"{first.engine}: {first.what} went from {first.before} to {first.after}"
            + (f", and {more} more regressions" if more else ""),
            expected="nothing worse than the tolerances",
            next_step=_next_step(first, reports[1]),
        )


_TOLERANCES = {
    "fidelity": "--max-fidelity-loss", "Y PSNR change": "--max-psnr-loss", "size": "--max-larger",
    "memory": "--max-memory", "GPU memory": "--max-memory", "speed-up": "--max-slower", "latency": "--max-slower",
}  # fmt: skip


def _next_step(regression: "Change", after: Path) -> str:
    option = next((option for what, option in _TOLERANCES.items() if regression.what.startswith(what)), None)
    if option is None:  # an engine that is missing, or that misses its gate
        return f"its page has the details: srdeploy report {after} -o FOLDER"
    return f"raise {option} to allow it"


def _write_again(options: ReportOptions) -> None:
    from srdeploy.runtime.report.write import read_report, write_report

    if options.output is None:
        raise UsageError("no output folder", next_step="name one with -o, or use --compare with two reports")
    document = read_report(options.reports[0], with_pictures=True)
    page = write_report(document, options.output, force=options.force)
    if options.as_json:
        emit_json({"report": str(page), "verdict": document["verdict"]})
    else:
        console.print(document["verdict"]["headline"], markup=False)
    next_command("python3", "-m", "webbrowser", page.resolve().as_uri())
