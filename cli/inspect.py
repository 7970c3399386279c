"""srdeploy inspect: what a checkpoint, ONNX file, engine or bundle is, and how that is known."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srdeploy.cli.checkpoint_options import CheckpointOptions, show_ranking
from srdeploy.cli.console import RichProgress, emit_json, next_command, table, warning_line
from srdeploy.cli.options import ANY_PATH, JSON, argument, arguments, example, option, option_group, verb
from srdeploy.core.compression import change_label, summary
from srdeploy.core.contract import GraphForm
from srdeploy.core.sizes import format_bytes

EXAMPLE = example(
    """
srdeploy inspect RCAN_BIX4.pt
srdeploy inspect model_best.pth.tar --probe photos/
srdeploy inspect rcan_x4.srd --json
"""
)

_BY = {
    "metadata": "the file's metadata",
    "flag": "you",
    "wrapper": "the wrapper",
    "tensors": "the tensors",
    "probe": "real images",
    "default": "assumed",
    "open": "OPEN",
}


@arguments
class InspectOptions:
    """What `srdeploy inspect` is given."""

    path: Path = argument(type=ANY_PATH, metavar="FILE")
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(InspectOptions, epilog=EXAMPLE)
def command(options: InspectOptions) -> None:
    """Show what FILE (a checkpoint, ONNX file, engine or bundle) is.

    For a checkpoint: its layout, every hyper-parameter with the tensor it was read from, and what the tensors cannot
    say with who settled it. Reading a file runs no code of it.
    """
    from srdeploy.cli.inspect_documents import document_of

    progress = RichProgress()
    document = document_of(options.path, options.checkpoint_options, progress)
    {"checkpoint": _checkpoint, "onnx": _onnx, "engine": _engine, "bundle": _bundle}[document["kind"]](document)
    if options.as_json:
        emit_json(document)
    _next(options.path, document, options.checkpoint_options)


def _checkpoint(document: Mapping[str, Any]) -> None:
    dialect = document["dialect"]
    where = " > ".join(document["wrapper_path"]) or "bare state_dict"
    rows = [
        *_file_rows(document),
        ("container", document["container"]),
        ("weights at", where + (f" without prefix {document['stripped_prefix']}" * bool(document["stripped_prefix"]))),
        ("tensors", f"{document['tensors']} ({', '.join(f'{n} {kind}' for kind, n in document['dtypes'].items())})"),
        ("layout", f"{dialect['title']} ({dialect['name']})"),
        ("source", dialect["source"]),
    ]
    if document["ignored"]:
        rows.append(("ignored", ", ".join(document["ignored"])))
    table("Checkpoint", ("", ""), rows)
    origins = document["hyperparameters"]
    configuration = document["configuration"]
    decided = {name: _BY[decision["by"]] for decision in document["decisions"] for name in decision["fields"]}
    table(
        "Configuration",
        ("", "value", "from"),
        [
            (name, _text(value), decided.get(name) or origins.get(name, "the family's code"))
            for name, value in configuration.items()
        ],
    )
    if document["decisions"]:
        table(
            "What the tensors do not say",
            ("flag", "value", "settled by", "why", "candidates"),
            [
                (
                    "--" + decision["choice"].replace("_", "-"),
                    "-" if decision["by"] == "open" else _text(decision["value"]),
                    _BY[decision["by"]],
                    decision["reason"],
                    " ".join(_text(value) for value in decision["candidates"]),
                )
                for decision in document["decisions"]
            ],
        )
    if document["probe"]:
        show_ranking([(entry["values"], entry["psnr_db"]) for entry in document["probe"]])
    _network(document["network"])
    for note in document["notes"]:
        RichProgress().note(f"note: {note}")


def _onnx(document: Mapping[str, Any]) -> None:
    operators = ", ".join(f"{name} {count}" for name, count in list(document["operators"].items())[:8])
    rows = [
        *_file_rows(document),
        ("producer", document["producer"] or "-"),
        ("opset", ", ".join(f"{domain} {version}" for domain, version in document["opset"].items())),
        *((f"input {each['name']}", _value(each)) for each in document["inputs"]),
        *((f"output {each['name']}", _value(each)) for each in document["outputs"]),
        ("operators", operators),
        ("constants", ", ".join(f"{count:,} {kind}" for kind, count in document["weight_types"].items())),
    ]
    if document["manifest"]:
        rows.append(("manifest", "matches" if document["manifest"]["matches"] else "belongs to other bytes"))
    table("ONNX file", ("", ""), rows)
    if document["contract"] is None:
        warning_line("no srdeploy metadata: scale, colours and range are unknown, and the other verbs refuse this file")
        return
    _contract(document)


def _engine(document: Mapping[str, Any]) -> None:
    precision = document["precision"]
    rows = [
        *_file_rows(document),
        ("engine", document["engine"]),
        ("precision", f"{precision.get('built', '-')} (requested {precision.get('asked', '-')})"),
        ("shapes", ", ".join(document["profiles"]) or "all"),
        ("runs on", _text(document["target"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("built", document["created"]),
    ]
    table("Engine", ("", ""), rows)
    _contract(document)
    for note in document["notes"]:
        warning_line(note)


def _bundle(document: Mapping[str, Any]) -> None:
    edited = ", but for the edited README.md" if document["card_edited"] else ""
    signature = document["signature"]
    rows = [
        *_file_rows(document),
        ("files", f"{len(document['files'])}, all as the manifest says{edited}"),
        (
            "signature",
            "none" if signature is None else f"{signature['file']} ({signature['method']}), not verified",
        ),
        ("made", document["created"]),
    ]
    table("Bundle", ("", ""), rows)
    if signature is not None:
        RichProgress().note(f"to verify the signature: {shlex.join(signature['verify_command'])}")
    engines = [
        (
            entry["file"],
            entry["engine"],
            entry["precision"],
            "yes" if entry["verified"] else "no",
            _number(entry["fidelity_db"], ".1f"),
            _number(entry["latency_ms"], ".2f"),
            _number(entry["speedup"], ".2f"),
        )
        for entry in document["engines"]
    ]
    table("Engines", ("file", "engine", "precision", "verified", "fidelity dB", "median ms", "x eager"), engines)
    if document["excluded"]:
        reasons = [
            (each["engine"], each["precision"], f"{each['stage']}: {each['reason']}") for each in document["excluded"]
        ]
        table("Left out", ("engine", "precision", "why"), reasons)
    _contract(document)


_LAYERS_SHOWN = 8
_WEIGHT_BITS = {7: ", weights of 7 bits: for every processor", 8: ", weights of 8 bits: x86 CPUs need VNNI"}


def _contract(document: Mapping[str, Any]) -> None:
    contract = document["contract"]
    made_from = contract["provenance"].get("checkpoint", {})
    rows = [
        ("precision", contract["precision"] + _WEIGHT_BITS.get(contract["weight_bits"], "")),
        ("checkpoint", f"{made_from.get('name', '-')} ({contract['checkpoint_sha256'][:16]}…)"),
    ]
    if "title" in made_from:
        rows.append(("layout", made_from["title"]))
    if (compression := contract["provenance"].get("compression")) is not None:
        rows.append(("compressed", _compression(compression)))
    form = GraphForm.from_json(contract["form"])
    if not form.plain:
        rows.append(("form", str(form)))
    rows += [
        (f"--{each['choice'].replace('_', '-')}", f"{_text(each['value'])} ({_BY[each['by']]}: {each['reason']})")
        for each in made_from.get("decisions", ())
        if each.get("contested", True)
    ]
    table("Made from", ("", ""), rows)
    _network(document["network"])


def _compression(compression: Mapping[str, Any]) -> str:
    """Return what was compressed, in a few lines: the changes with the largest shares of the error first."""
    layers = compression["layers"]
    lines = [summary(compression)]
    largest = sorted(layers, key=lambda entry: -entry["error_share"])
    lines += [
        f"{entry['layer']} {change_label(entry)}: {100 * entry['error_share']:.1f} % of the error"
        for entry in largest[:_LAYERS_SHOWN]
    ]
    if len(layers) > _LAYERS_SHOWN:
        lines.append(f"and {len(layers) - _LAYERS_SHOWN} more changes; all of them with --json")
    lines += compression.get("notes", ())
    return "\n".join(lines)


def _network(network: Mapping[str, Any]) -> None:
    field = network["receptive_field"]
    side = network["largest_square_input"]
    rows = [
        ("architecture", network["architecture"]),
        ("scale", f"x{network['scale']}" + (f", {network['trim']} pixels short" if network["trim"] else "")),
        ("colours", {"rgb": "RGB", "y": "Y (one channel, BT.601)"}[network["colours"]]),
    ]
    if "value_range" in network:
        inside = network["value_range"]
        rows.append(("range inside", "open" if inside is None else f"0..{inside:g} (0..1 outside)"))
    if "values" in network:
        rows.append(("values", f"{network['values']:,}"))
    rows += [
        ("multiply-adds", f"{network['macs_per_pixel'] / 1e6:.3f} M per LR pixel"),
        ("receptive field", "global (channel attention)" if field == "global" else f"{field} x {field} LR pixels"),
        ("largest tensor", f"{network['largest_tensor_per_pixel']} elements per LR pixel"),
        ("largest square input", f"{side} x {side} LR pixels (beyond, a tensor passes 2^31 elements)"),
    ]
    if network["min_size"] > 1:
        rows.append(("minimum input", f"{network['min_size']} x {network['min_size']}"))
    table("Network", ("", ""), rows)


def _file_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("file", f"{document['file']} ({format_bytes(document['bytes'])})"), ("sha256", document["sha256"])]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(entry) for entry in value) or "none"
    return str(value)


def _value(entry: Mapping[str, Any]) -> str:
    return f"{entry['type']} {' x '.join(str(size) for size in entry['shape'])}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _next(path: Path, document: Mapping[str, Any], options: CheckpointOptions) -> None:
    if document["kind"] == "checkpoint":
        open_choices = [each for each in document["decisions"] if each["by"] == "open"]
        flags = [f"--{each['choice'].replace('_', '-')} {_text(each['candidates'][0])}" for each in open_choices]
        words = [word for flag in flags for word in flag.split()]
        next_command("srdeploy", "export", str(path), *options.flags(), *words, "-o", "model.onnx")
    elif document["kind"] == "onnx" and document["contract"] is not None:
        next_command("srdeploy", "build", str(path), "--engine", "openvino", "-o", f"{path.stem}.engine")
    elif document["kind"] in ("engine", "bundle"):
        next_command("srdeploy", "upscale", str(path), "photo.png", "-o", "photo_upscaled.png")
