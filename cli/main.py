"""srdeploy's command line: which verb lives where, and the one place where errors become lines and exit codes."""

import sys
from collections.abc import Sequence

import click

from srdeploy.cli.console import error_line
from srdeploy.cli.lazy import LazyGroup
from srdeploy.core import interrupts
from srdeploy.core.errors import SrdeployError

VERBS = {
    # verb -> (module, one line of help); a module is imported when its verb runs, so that --help stays fast.
    "inspect": ("srdeploy.cli.inspect", "Show what a checkpoint, ONNX file, engine or bundle is."),
    "export": ("srdeploy.cli.export", "Export a checkpoint to ONNX and check it against the network."),
    "quantize": ("srdeploy.cli.quantize", "Make an FP16, BF16, INT8 or FP8 graph with real images."),
    "compress": ("srdeploy.cli.compress", "Make a graph of fewer multiply-adds that keeps a bound in dB."),
    "build": ("srdeploy.cli.build", "Build an engine from an ONNX file."),
    "verify": ("srdeploy.cli.verify", "Compare an ONNX file or engine with the eager network, in decibels."),
    "bench": ("srdeploy.cli.bench", "Measure latency next to the eager network."),
    "upscale": ("srdeploy.cli.upscale", "Upscale images, folders and videos."),
    "deploy": ("srdeploy.cli.deploy", "Run all steps: from a checkpoint to a verified bundle."),
    "package": ("srdeploy.cli.package", "Write a bundle in the layout of another program."),
    "report": ("srdeploy.cli.report", "Write or compare reports."),
    "cache": ("srdeploy.cli.cache", "List, explain, check and clean the engine cache."),
    "demo": ("srdeploy.cli.demo", "Deploy and run the example networks."),
    "doctor": ("srdeploy.cli.doctor", "Report which engines can build and run on this machine, and why not."),
}


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="srdeploy", prog_name="srdeploy")
def cli() -> None:
    """From a trained super-resolution checkpoint (SRDenseNet, RCAN) to an engine whose numbers are proven.

    \b
    Exit codes: 0 ok, 1 bug, 2 usage, 3 file not understood, 4 export failed, 5 build failed,
    6 parity or quality gate missed, 7 benchmark unstable, 8 the machine lacks something, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code (see `srdeploy.core.errors`)."""
    interrupts.install()
    code = run(arguments)
    interrupts.ignore()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; tests call this."""
    try:
        result = cli.main(args=arguments, prog_name="srdeploy", standalone_mode=False)
    except SrdeployError as error:
        error_line(str(error))
        return error.exit_code
    except click.exceptions.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else None
        if usage:
            click.echo(usage, err=True)
        error_line(error.format_message())
        return 2
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    error_line("interrupted; nothing was left half-written")
    return 130


if __name__ == "__main__":
    main()
