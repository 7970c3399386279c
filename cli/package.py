"""`srdeploy package`: a bundle in the layout of another program."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, table
from srdeploy.cli.options import FORCE, JSON, OUTPUT_PATH, argument, arguments, example, option, verb
from srdeploy.core.errors import UsageError

if TYPE_CHECKING:
    from srdeploy.core.onnx_file import GraphFile
    from srdeploy.runtime.package.packaged import Packaged

Write = Callable[..., "Packaged"]


@arguments
class PackageOptions:
    """What `srdeploy package` is given."""

    bundle: Path = argument(type=click.Path(exists=True, file_okay=False, path_type=Path))
    triton: Path | None = option(
        "--triton", type=OUTPUT_PATH, default=None, help="Triton model repository to write, a folder."
    )
    ovms: Path | None = option(
        "--ovms", type=OUTPUT_PATH, default=None, help="Folder for OpenVINO Model Server to write."
    )
    flat: Path | None = option(
        "--flat",
        type=OUTPUT_PATH,
        default=None,
        help="Folder to write for ComfyUI and chaiNNer: 4x_NAME_fp32.onnx and 4x_NAME_fp16.onnx.",
    )
    name: str | None = option("--name", default=None, help="NAME in the models' names; default: the bundle's.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(
    PackageOptions,
    epilog=example(
        """
srdeploy package rcan_x2.srd --triton models
srdeploy package rcan_x2.srd --ovms models-openvino --name cameras
srdeploy package rcan_x2.srd --flat ComfyUI/models/onnx/srdeploy
"""
    ),
)
def command(options: PackageOptions) -> None:
    """Write BUNDLE in the layout of another program: at least one of --triton, --ovms and --flat.

    Every file of the bundle is compared with its manifest first. A folder is written whole or not at all.
    """
    from srdeploy.core.artifact import check_output_folder
    from srdeploy.runtime.bundle import read_bundle
    from srdeploy.runtime.package.packaged import PACKAGE

    targets = _targets(options)
    for output in targets:
        check_output_folder(output, force=options.force, known_by=PACKAGE)
    bundle = read_bundle(options.bundle)
    bundle.verify()
    results = [write(bundle, output, name=options.name, force=options.force) for output, write in targets.items()]
    if options.as_json:
        emit_json({"bundle": str(options.bundle), "packages": [result.to_json() for result in results]})
        return
    for result in results:
        table(str(result.path), [result.target], [[line] for line in result.contents])
        for note in result.notes:
            RichProgress().note(f"note: {note}")
    next_command("srdeploy", "inspect", str(options.bundle))


def _targets(options: PackageOptions) -> Mapping[Path, "Write"]:
    """Return what is to be written, by output."""
    from srdeploy.runtime.package.flat import write_flat
    from srdeploy.runtime.package.ovms import write_ovms
    from srdeploy.runtime.package.triton import write_triton

    flat = partial(write_flat, in_rgb=_in_rgb)
    given: list[tuple[Path | None, Write]] = [
        (options.triton, write_triton),
        (options.ovms, write_ovms),
        (options.flat, flat),
    ]
    targets = {output.resolve(): write for output, write in given if output is not None}
    if not targets:
        raise UsageError("nothing to write", expected="--triton DIR, --ovms DIR or --flat DIR")
    if len(targets) < sum(output is not None for output, _ in given):
        raise UsageError("two targets with the same output", next_step="give each a folder of its own")
    return targets


def _in_rgb(graph: "GraphFile") -> "GraphFile":
    from srdeploy.core.contract import GraphForm
    from srdeploy.export.forms import formed_graph

    return formed_graph(graph, GraphForm(color_wrapper=True))
