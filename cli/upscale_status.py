"""srdeploy upscale --status: what is done, what failed on which host, and what is left of a folder."""

from pathlib import Path

from srdeploy.cli.console import RichProgress, emit_json, table

_SHOWN = 20


def show_status(output: Path, *, as_json: bool) -> None:
    """Print the status of an output folder as text, or as one JSON document.

    Raises:
        InputError: the folder has no journal.
    """
    from srdeploy.upscale.scale.status import folder_status

    status = folder_status(output)
    if as_json:
        emit_json({"output": str(output), **status.to_json()})
        return
    show = RichProgress().note
    show(f"{output}: {status.done} of {status.total} done, {len(status.failed)} failed, {status.left_count} left")
    hosts = sorted({*status.done_by_host, *status.failed_by_host})
    rows = [(host, status.done_by_host.get(host, 0), status.failed_by_host.get(host, 0)) for host in hosts]
    if rows:
        table("", ("host", "done", "failed"), rows)
    for run in status.running:
        shard = f", shard {run['shard']}" if run["shard"] else ""
        show(f"running: process {run['pid']} on {run['host']}{shard}, {run['device']}")
    if not status.running:
        show("no run is at work now (as far as this file system shows locks)")
    for name, failure in list(status.failed.items())[:_SHOWN]:
        show(f"failed: {name}: {failure.error} ({failure.host}, attempt {failure.attempt})")
    if status.left is None:
        show(f"{status.source} cannot be read here: which pictures are left is unknown")
    for shard, count in status.left_by_shard.items():
        show(f"left in shard {shard}: {count}")
    for name in (status.left or [])[:_SHOWN]:
        show(f"left: {name}")
    hidden = max(0, len(status.failed) - _SHOWN) + max(0, len(status.left or []) - _SHOWN)
    if hidden:
        show(f"... and {hidden} more (--json lists all)")
