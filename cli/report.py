"""srdeploy report: write the page of a report again, or hold two reports against each other."""

from pathlib import Path

import click

from srdeploy.cli.console import console, emit_json, markdown_table, next_command, table
from srdeploy.cli.options import EXISTING, example, force_option, json_option, output_option, refuse_two_documents
from srdeploy.core.errors import GateError, UsageError

EXAMPLE = example(
    """
srdeploy report rcan_x4.srd -o page/
srdeploy report --compare main/report.json branch/report.json --max-slower 10
"""
)

HEADERS = ("engine", "figure", "before", "after", "change", "verdict")


@click.command(epilog=EXAMPLE)
@click.argument("reports", nargs=-1, type=EXISTING, metavar="REPORT...")
@output_option(required=False, help_text="Folder for the page that is written again.")
@click.option("--compare", is_flag=True, help="Compare two reports; a regression ends with exit code 6.")
@click.option(
    "--max-slower", type=float, default=10.0, show_default=True, metavar="%", help="Allowed rise of a median."
)
@click.option("--max-fidelity-loss", type=float, default=0.5, show_default=True, metavar="DB", help="Allowed loss.")
@click.option("--max-psnr-loss", type=float, default=0.01, show_default=True, metavar="DB", help="Allowed loss.")
@click.option("--max-larger", type=float, default=5.0, show_default=True, metavar="%", help="Allowed growth.")
@click.option(
    "--max-memory", type=float, default=25.0, show_default=True, metavar="%", help="Allowed growth of memory."
)
@click.option("--schema", "print_schema", is_flag=True, help="Print the JSON schema of report.json and end.")
@click.option("--markdown", is_flag=True, help="Print the comparison as Markdown on stdout.")
@force_option
@json_option
def command(
    reports: tuple[Path, ...],
    output: Path | None,
    compare: bool,
    print_schema: bool,
    markdown: bool,
    force: bool,
    as_json: bool,
    **allowed: float,
) -> None:
    """Work with reports: REPORT is a report.json, a folder with it, or a bundle.

    With --compare, the second report is held against the first, engine by engine: worse by more than a tolerance, a
    gate newly missed or an engine gone is a regression.
    """
    from srdeploy.runtime.report.write import schema

    refuse_two_documents(as_json=as_json, markdown=markdown)
    if print_schema:
        emit_json(schema())
        return
    if len(reports) != (2 if compare else 1):
        raise UsageError(
            f"{len(reports)} reports" + (" for --compare" if compare else ""),
            expected="two: before and after" if compare else "one, and -o FOLDER",
        )
    if compare:
        _compare(reports, allowed, as_json=as_json, markdown=markdown)
    else:
        _write_again(reports[0], output, force=force, as_json=as_json)


def _compare(reports: tuple[Path, ...], allowed: dict[str, float], *, as_json: bool, markdown: bool) -> None:
    from srdeploy.runtime.report.compare import Tolerances, compare
    from srdeploy.runtime.report.write import read_report

    tolerances = Tolerances(
        fidelity_db=allowed["max_fidelity_loss"],
        psnr_db=allowed["max_psnr_loss"],
        latency=allowed["max_slower"] / 100.0,
        size=allowed["max_larger"] / 100.0,
        memory=allowed["max_memory"] / 100.0,
    )
    comparison = compare(read_report(reports[0]), read_report(reports[1]), tolerances)
    rows = [
        (change.engine, change.what, change.before, change.after, change.change, "WORSE" if change.regression else "ok")
        for change in comparison.changes
    ]
    if as_json:
        emit_json(comparison.to_json())
    elif markdown:
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
            next_step="see the table above, or raise a tolerance",
        )


def _write_again(report: Path, output: Path | None, *, force: bool, as_json: bool) -> None:
    from srdeploy.runtime.report.write import read_report, write_report

    if output is None:
        raise UsageError("no output folder", next_step="name one with -o, or use --compare with two reports")
    document = read_report(report, with_pictures=True)
    page = write_report(document, output, force=force)
    if as_json:
        emit_json({"report": str(page), "verdict": document["verdict"]})
    else:
        console.print(document["verdict"]["headline"], markup=False)
    next_command("xdg-open", str(page))
