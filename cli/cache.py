"""srdeploy cache: the engine cache, listed, explained, cleaned and checked."""

import datetime
from pathlib import Path
from typing import Any

import click

from srdeploy.cli.console import console, emit_json, table
from srdeploy.cli.options import BYTES, EXISTING, JSON, argument, arguments, example, option, verb
from srdeploy.core.errors import InputError
from srdeploy.core.sizes import format_bytes


@click.group(
    epilog=example(
        """
srdeploy cache ls
srdeploy cache explain model.plan
srdeploy cache gc --max-size 5GiB --older-than 30
"""
    )
)
def command() -> None:
    """The engine cache: engines are found in it by what decides their bytes, never by name.

    It is in the system's cache folder; the environment variable SRDEPLOY_CACHE_DIR moves it.
    """


@arguments
class ListOptions:
    """What `srdeploy cache ls` and `srdeploy cache verify` are given."""

    as_json: bool = option("--json", default=False, help=JSON)


@arguments
class ExplainOptions:
    """What `srdeploy cache explain` is given."""

    engine: Path = argument(type=EXISTING)
    other: Path | None = argument(type=EXISTING, default=None)
    as_json: bool = option("--json", default=False, help=JSON)


@arguments
class CleanOptions:
    """What `srdeploy cache gc` is given."""

    max_size: int | None = option(
        "--max-size", type=BYTES, default=None, help="Keep at most this much, the last used first."
    )
    older_than: float | None = option(
        "--older-than",
        type=click.FloatRange(min=0),
        default=None,
        metavar="DAYS",
        help="Remove engines not used for so many days.",
    )
    dry_run: bool = option("--dry-run", default=False, help="Only report what would be removed.")
    as_json: bool = option("--json", default=False, help=JSON)


@verb(ListOptions, name="ls", epilog=example("srdeploy cache ls --json"))
def list_(options: ListOptions) -> None:
    """List the cached engines, the last used first."""
    cache = _cache()
    entries = [entry.to_json() for entry in cache.entries()]
    if options.as_json:
        emit_json({"root": str(cache.root), "entries": entries})
        return
    table(f"{cache.root}", _HEADERS, [_row(entry) for entry in entries])
    console.print(f"{len(entries)} engines, {format_bytes(sum(entry['bytes'] for entry in entries))}")


@verb(ExplainOptions, name="explain", epilog=example("srdeploy cache explain model.plan"))
def explain(options: ExplainOptions) -> None:
    """Show which fields of an engine's key differ from the nearest cached engine, or from another engine.

    ENGINE is a built engine: its sidecar holds the key that was requested. A key with no differences is a hit.
    """
    from srdeploy.runtime.engines.cache import key_differences, nearest
    from srdeploy.runtime.engines.sidecar import key_sha256

    key, cache = _key(options.engine), _cache()
    lookup = cache.lookup(key)
    if options.other is not None:
        against, pairs = str(options.other), key_differences(key, _key(options.other))
    else:
        found = nearest(cache, key)
        against, pairs = (f"cached engine {found[0].key_sha256[:16]}", found[1]) if found else ("nothing", {})
    differences = {name: {"wanted": wanted, "there": cached} for name, (wanted, cached) in pairs.items()}
    if options.as_json:
        emit_json(
            {
                "key": key,
                "key_sha256": key_sha256(key),
                "hit": lookup.engine is not None,
                "reason": lookup.reason,
                "compared_with": against,
                "differences": differences,
            }
        )
        return
    console.print(f"{'hit' if lookup.engine else 'miss'}: {lookup.reason}", soft_wrap=True, markup=False)
    if differences:
        rows = [(name, pair["wanted"], pair["there"]) for name, pair in differences.items()]
        table(f"compared with {against}", ("field", "wanted", "there"), rows)
    else:
        console.print(f"no field differs from {against}", soft_wrap=True, markup=False)


@verb(CleanOptions, name="gc", epilog=example("srdeploy cache gc --max-size 5GiB --older-than 30 --dry-run"))
def gc(options: CleanOptions) -> None:
    """Remove damaged engines, and others by size or age if requested."""
    removed = _cache().gc(max_bytes=options.max_size, older_than_days=options.older_than, dry_run=options.dry_run)
    entries = [entry.to_json() for entry in removed]
    if options.as_json:
        emit_json({"removed": entries, "dry_run": options.dry_run})
        return
    table("would be removed" if options.dry_run else "removed", _HEADERS, [_row(entry) for entry in entries])


@verb(ListOptions, name="verify", epilog=example("srdeploy cache verify"))
def verify(options: ListOptions) -> None:
    """Read every cached engine and compare it with its sidecar; exit 3 when one is damaged."""
    entries = [entry.to_json() for entry in _cache().entries(check=True)]
    damaged = [entry for entry in entries if entry["problem"]]
    if options.as_json:
        emit_json({"entries": entries, "damaged": len(damaged)})
    else:
        table("", _HEADERS, [_row(entry) for entry in entries])
    if damaged:
        raise InputError(
            f"{len(damaged)} of {len(entries)} cached engines are damaged, the first: {damaged[0]['problem']}",
            next_step="remove them with: srdeploy cache gc",
        )


for each in (list_, explain, gc, verify):
    command.add_command(each)

_HEADERS = ("key", "engine", "precision", "from", "profile", "size", "last used", "problem")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    used = datetime.datetime.fromtimestamp(entry["last_used"]).strftime("%Y-%m-%d %H:%M")
    profiles = "; ".join("x".join(map(str, profile["max"])) for profile in entry["profiles"]) or "any"
    return (
        entry["key"][:12],
        entry["engine"] or "?",
        entry["precision"] or "?",
        entry["onnx"] or "?",
        profiles,
        format_bytes(entry["bytes"]),
        used,
        entry["problem"] or "",
    )


def _key(engine: Path) -> dict[str, Any]:
    from srdeploy.core.manifest import read_manifest

    key = dict(read_manifest(engine).details.get("key") or {})
    if not key:
        raise InputError(f"the sidecar of {engine} holds no key", expected="an engine built by srdeploy build")
    return key


def _cache() -> Any:
    from srdeploy.runtime.engines.cache import EngineCache

    return EngineCache()
