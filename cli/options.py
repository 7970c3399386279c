"""Options of a verb as a frozen dataclass: each field declares its click option, and a command line is written from it.

@arguments
class ExportOptions:
    checkpoint: Path = argument(type=EXISTING)
    output: Path = option("-o", "--output", type=OUTPUT_PATH, help="ONNX file to write.")
    force: bool = option("--force", default=False, help=FORCE)

@verb(ExportOptions, epilog=example("srdeploy export network.pt -o network.onnx"))
def command(options: ExportOptions) -> None: ...

command_line("export", ExportOptions(checkpoint=..., output=...))  # ["srdeploy", "export", ...]
"""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import click

from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape, format_shape, parse_shape
from srdeploy.core.sizes import parse_bytes

Options = TypeVar("Options")

JSON = "Print one JSON document on stdout."
FORCE = "Replace an existing output."
DEVICE = "auto, cpu, cuda or cuda:N."
THREADS = "CPU threads; default: all."
HR = "The images are high resolution: inputs are made from them, and they are the ground truth."
MAX_WORST_DROP = "Maximum loss of Y PSNR in dB of the worst held-out image."
MEMORY = "Memory that the work may take, such as 8GiB; default: half of what is free."

_KEY = "command line"


@dataclass(frozen=True)
class _Declaration:
    """How a field is written on the command line: an option, an argument (no declarations), or a group of options."""

    declarations: tuple[str, ...] = ()
    type: Any = None
    help: str | None = None
    metavar: str | None = None
    show_default: bool = False
    group: Any = None


def option(
    *declarations: str,
    help: str | None = None,
    type: Any = None,
    default: Any = MISSING,
    metavar: str | None = None,
    show_default: bool = False,
) -> Any:
    """Declare a field that is an option.

    Args:
        declarations: as click takes them: "-o", "--output", or "--cache/--no-cache".
        help: what the option does, for --help.
        type: a click type or a Python type; text without one.
        default: without one the option is required; a bool makes it a flag, () makes it repeatable.
        metavar: what --help shows in place of the value.
        show_default: show the default in --help.
    """
    return field(default=default, metadata={_KEY: _Declaration(declarations, type, help, metavar, show_default)})


def argument(*, type: Any, default: Any = MISSING, metavar: str | None = None, many: bool = False) -> Any:
    """Declare a field that is a positional argument; `many` takes one or more (none too, with a default)."""
    return field(default=default, metadata={_KEY: _Declaration(("many",) if many else (), type, None, metavar)})


def option_group(*, default_factory: Any) -> Any:
    """Declare a field that holds another options class, whose options the verb has too."""
    return field(default_factory=default_factory, metadata={_KEY: _Declaration(group=default_factory)})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, argument, option_group))
def arguments(options: type[Options]) -> type[Options]:
    """Make a class of `option`, `argument` and `option_group` fields a frozen dataclass with keyword arguments."""
    return dataclass(frozen=True, kw_only=True)(options)


def verb(
    options: type[Options], *, epilog: str, name: str | None = None
) -> Callable[[Callable[[Options], int | None]], click.Command]:
    """Return a decorator that makes a function of one options object a click command with these options."""

    def decorate(function: Callable[[Options], int | None]) -> click.Command:
        @functools.wraps(function)
        def call(**values: Any) -> int | None:
            return function(from_values(options, values))

        return click.command(name, epilog=epilog, params=parameters(options))(call)

    return decorate


def parameters(options: Any) -> list[click.Parameter]:
    """Return the click parameters of an options class, in the order of its fields."""
    found: list[click.Parameter] = []
    for entry, declared in _declared(options):
        if declared.group is not None:
            found += parameters(declared.group)
        elif _is_argument(declared):
            found.append(_argument(entry, declared))
        else:
            found.append(_option(entry, declared))
    return found


def from_values(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Return an options object from click's parsed values by parameter name."""
    filled = {
        entry.name: values[entry.name] if declared.group is None else from_values(declared.group, values)
        for entry, declared in _declared(options)
    }
    return options(**filled)


def command_line(name: str, options: Any) -> list[str]:
    """Return the command line that gives these options to a verb; options at their defaults are omitted."""
    return ["srdeploy", *name.split(), *_positional(options), *option_words(options)]


def option_words(options: Any) -> list[str]:
    """Return the options of an options object as words of a command line, without the positional arguments."""
    words: list[str] = []
    for entry, declared in _declared(options):
        value = getattr(options, entry.name)
        if declared.group is not None:
            words += option_words(value)
        elif not _is_argument(declared) and value != entry.default:
            words += _option_words(value, declared, repeatable=entry.default == ())
    return words


def _declared(options: Any) -> list[tuple[Field[Any], _Declaration]]:
    return [(entry, entry.metadata[_KEY]) for entry in fields(options)]


def _is_argument(declared: _Declaration) -> bool:
    return declared.group is None and not any(text.startswith("-") for text in declared.declarations)


def _argument(entry: Field[Any], declared: _Declaration) -> click.Argument:
    return click.Argument(
        [entry.name],
        type=declared.type,
        metavar=declared.metavar,
        nargs=-1 if declared.declarations else 1,
        required=entry.default is MISSING,
    )


def _option(entry: Field[Any], declared: _Declaration) -> click.Option:
    given = {} if entry.default is MISSING else {"default": entry.default}
    return click.Option(
        [entry.name, *declared.declarations],
        type=declared.type,
        help=declared.help,
        metavar=declared.metavar,
        show_default=declared.show_default or None,
        required=entry.default is MISSING,
        multiple=entry.default == (),
        is_flag=True if isinstance(entry.default, bool) else None,
        **given,
    )


def _positional(options: Any) -> list[str]:
    words: list[str] = []
    for entry, declared in _declared(options):
        if _is_argument(declared):
            value = getattr(options, entry.name)
            values = value if declared.declarations else (value,)
            words += [_text(each, declared.type) for each in values if each is not None]
    return words


def _option_words(value: Any, declared: _Declaration, *, repeatable: bool) -> list[str]:
    on, _, off = declared.declarations[0].partition("/")
    if isinstance(value, bool):
        return [on if value else off]
    values = value if repeatable else (value,)
    return [word for each in values for word in (on, _text(each, declared.type))]


def _text(value: Any, kind: Any) -> str:
    """Return the text that is parsed as this very value."""
    if isinstance(kind, _Tuple):
        return kind.text(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Path):
        return f"./{value}" if str(value).startswith("-") else str(value)
    return str(value)


class OutputPath(click.ParamType[Path]):
    """The name of a file or folder to write; "." and ".." become the folders that they name."""

    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse a name that cannot be one."""
        text = str(value)
        if not text.strip() or "\0" in text:
            self.fail("the output has no name", param, ctx)
        path = Path(value)
        if too_long := _too_long(path):
            self.fail(too_long, param, ctx)
        return path if path.name not in ("", "..") else path.resolve()


class InputPath(click.Path):
    """The name of a file or folder to read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a name that no file can have."""
        if too_long := _too_long(Path(value)):
            self.fail(too_long, param, ctx)
        return super().convert(value, param, ctx)


def _too_long(path: Path) -> str | None:
    """Return what is wrong with a path that the system would refuse to look up; None for others."""
    part = max(path.parts, key=lambda part: len(os.fsencode(part)), default="")
    if len(os.fsencode(part)) > 255:
        return f"{part[:40]}… is longer than the 255 bytes of a file name"
    return f"{str(path)[:40]}… is longer than the 4095 bytes of a path" if len(os.fsencode(path)) > 4095 else None


class _Tuple(click.ParamType[tuple[Any, ...]]):
    """Base of the types whose one value is a tuple."""

    def text(self, value: tuple[Any, ...]) -> str:
        """Return the text of a value."""
        raise NotImplementedError


class ShapeType(_Tuple):
    """A shape written as 1x3x180x320."""

    name = "NxCxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            n, c, h, w = value
            return n, c, h, w
        try:
            return parse_shape(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)

    def text(self, value: tuple[Any, ...]) -> str:
        """Return the text of a shape."""
        n, c, h, w = value
        return format_shape((n, c, h, w))


class SizeType(_Tuple):
    """A height and width written as 180x320."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            height, width = value
            return height, width
        try:
            return parse_shape(f"1x1x{value}")[2:]
        except UsageError:
            self.fail(f"size {value!r}; expected height x width such as 180x320", param, ctx)

    def text(self, value: tuple[Any, ...]) -> str:
        """Return the text of a size."""
        return "x".join(map(str, value))


class NumbersType(_Tuple):
    """Whole numbers joined by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text into sorted numbers; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of positive whole numbers such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))

    def text(self, value: tuple[Any, ...]) -> str:
        """Return the text of the numbers."""
        return ",".join(map(str, value))


class MeanType(_Tuple):
    """A mean color: a known name, or one or three values in 0..1 joined by commas."""

    name = "NAME|R,G,B"

    def __init__(self, known: Mapping[str, tuple[float, ...]]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        if value in self._known:
            return self._known[value]
        try:
            mean = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            mean = ()
        if len(mean) not in (1, 3) or not all(0 <= part <= 1 for part in mean):
            self.fail(f"{value!r} is neither {', '.join(self._known)} nor one or three numbers in 0..1", param, ctx)
        return mean

    def text(self, value: tuple[Any, ...]) -> str:
        """Return the text of a mean."""
        return ",".join(_text(part, None) for part in value)


class BytesType(click.ParamType[int]):
    """A number of bytes written as 8GiB, 512MiB or 1000000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value), "size")
        except UsageError as error:
            self.fail(str(error), param, ctx)


class EnumChoice(click.Choice[Any]):
    """A choice among members of an enumeration, written by their values."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """Return the text that selects a member."""
        return str(choice.value if isinstance(choice, Enum) else choice)


EXISTING = click.Path(exists=True, path_type=Path)
ANY_PATH = InputPath(path_type=Path)
OUTPUT_PATH = OutputPath()
SHAPE = ShapeType()
SIZE = SizeType()
NUMBERS = NumbersType()
BYTES = BytesType()
POSITIVE = click.IntRange(min=1)


def refuse_two_documents(*, as_json: bool, markdown: bool) -> None:
    """Refuse --json together with --markdown: stdout holds one document."""
    if as_json and markdown:
        raise UsageError("--json and --markdown", expected="one of them: both write to stdout")


def example(text: str) -> str:
    """Return the worked example at the end of a verb's --help."""
    return "\b\nExample:\n  " + text.strip().replace("\n", "\n  ")
