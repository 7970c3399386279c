"""Options that several verbs share, spelled once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape, parse_shape

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

EXISTING = click.Path(exists=True, path_type=Path)


class OutputPath(click.ParamType[Path]):
    """The name of a file or folder to write; "." and ".." become the folders they stand for."""

    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse a name that cannot be one."""
        text = str(value)
        if not text.strip() or "\0" in text:
            self.fail("the output has no name", param, ctx)
        path = Path(value)
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            self.fail(f"{path.name[:40]}… is longer than the 255 bytes of a file name", param, ctx)
        return path if path.name not in ("", "..") else path.resolve()


OUTPUT_PATH = OutputPath()

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")


def output_option(*, required: bool = True, help_text: str = "Output file.") -> Callable[[Decorated], Decorated]:
    """Return the -o/--output option."""
    return click.option("-o", "--output", type=OUTPUT_PATH, required=required, help=help_text)


def refuse_two_documents(*, as_json: bool, markdown: bool) -> None:
    """Refuse --json together with --markdown: stdout holds one document."""
    if as_json and markdown:
        raise UsageError("--json and --markdown", expected="one of them: both write to stdout")


class ShapeType(click.ParamType[Shape]):
    """A shape written as 1x3x180x320."""

    name = "NxCxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_shape(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


SHAPE = ShapeType()


class SizeType(click.ParamType[tuple[int, int]]):
    """A height and width written as 180x320."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_shape(f"1x1x{value}")[2:]
        except UsageError:
            self.fail(f"size {value!r}; expected height x width such as 180x320", param, ctx)


SIZE = SizeType()


def example(text: str) -> str:
    """Return the worked example at the end of a verb's --help."""
    return "\b\nExample:\n  " + text.strip().replace("\n", "\n  ")
