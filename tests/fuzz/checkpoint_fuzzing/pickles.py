"""Write pickles that mention any class or function, whether it exists or not; nothing is imported or called.

The writer stands for every training script and PyTorch version that is not installed here, and for attackers.
"""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Name:
    """A class or function."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """`function(*arguments)`, then `__setstate__(state)` when there is one."""

    function: Any
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class New:
    """`kind.__new__(kind, *arguments)`, then `__setstate__(state)` when there is one."""

    kind: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A persistent id: how torch names storages and, in its older stream, classes with their source."""

    identifier: Any


@dataclass(frozen=True)
class Python2Text:
    """A Python 2 `str`, which is bytes."""

    data: bytes


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


@dataclass(frozen=True)
class Values:
    """A float32 storage with its values, as `persistent_id` describes it."""

    key: str
    values: tuple[float, ...]
    device: str = "cpu"
    kind: str = "FloatStorage"

    def identifier(self, *, legacy: bool) -> Persistent:
        """Return ("storage", class, key, device, count), with the view that the older stream adds."""
        parts = ("storage", Name("torch", self.kind), self.key, self.device, len(self.values))
        return Persistent((*parts, None) if legacy else parts)

    def data(self) -> bytes:
        """Return the values as little-endian float32."""
        return struct.pack(f"<{len(self.values)}f", *self.values)


def pickled(value: Any) -> bytes:
    """Return a whole pickle of protocol 2."""
    return b"\x80\x02" + code_of(value) + b"."


def code_of(value: Any) -> bytes:
    """Return the opcodes that leave `value` on the stack."""
    match value:
        case Raw(code):
            return code
        case Name(module, name):
            return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        case Call(function, arguments, state):
            return code_of(function) + code_of(arguments) + b"R" + _state(state)
        case New(kind, arguments, state):
            return code_of(kind) + code_of(arguments) + b"\x81" + _state(state)
        case Persistent(identifier):
            return code_of(identifier) + b"Q"
        case Python2Text(data):
            return b"T" + struct.pack("<i", len(data)) + data
        case dict():
            return b"}(" + b"".join(code_of(key) + code_of(item) for key, item in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(code_of, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(code_of, value)) + b"t"
        case _:
            return _plain(value)


def _plain(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, bytes):
        return b"C" + bytes([len(value)]) + value
    raise TypeError(type(value))


def _state(state: Any) -> bytes:
    return b"" if state is None else code_of(state) + b"b"


def tensor(storage: Any, shape: tuple[int, ...], *, offset: int = 0, stride: tuple[int, ...] | None = None) -> Call:
    """Return a float32 tensor over a storage's persistent id, as PyTorch 0.4 and later write it."""
    ordered = Call(Name("collections", "OrderedDict"), ())
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (storage, offset, shape, contiguous(shape) if stride is None else stride, False, ordered),
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def zip_file(root: Any, storages: tuple[Values, ...] = (), *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return what torch.save has written since 1.6."""
    stream = io.BytesIO()
    entries: dict[str, str | bytes] = {"archive/data.pkl": pickled(root), "archive/byteorder": "little"}
    entries |= {f"archive/data/{storage.key}": storage.data() for storage in storages}
    entries["archive/version"] = "3\n"
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # without the time of day
    return stream.getvalue()


def legacy_file(root: Any, storages: tuple[Values, ...] = ()) -> bytes:
    """Return what torch.save wrote before 1.6."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickled(part) for part in (MAGIC_NUMBER, 1001, machine, root, [storage.key for storage in storages])]
    for storage in storages:
        parts += [struct.pack("<q", len(storage.values)), storage.data()]
    return b"".join(parts)
