"""What a checkpoint's pickle is turned into: plain values and inert records that can do nothing.

No class of the file is ever looked up or created. A name is a `Global`, an instance or a call is a `Record`, a tensor
is a `TensorRecord` that describes where its bytes are. `rebuilt` handles the calls that describe tensors and plain
containers, each in a few lines of ours, and none of them imports, opens or executes anything.
"""

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.harmless import is_harmless

_MAX_NAME_LENGTH = 512
_AGAIN = "copy or download the file again"
_SAVE_FLOATS = "save the network's float32 state_dict() with torch.save"
_UNTRUSTED = "nothing in it was run; get the checkpoint from its authors, or ask them for the state_dict as safetensors"


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An instance of a class or the result of a call: name, arguments and the state it was given, all inert."""

    kind: Global
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: Any = None
    """Items that a list or dict subclass was filled with."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StorageRecord:
    """A block of values in the file: `count` values of `dtype` (None: raw bytes), under the file's own `key`.

    A view starts at value `offset` of the block `key` and has `count` values, while the block has `block_count`.
    """

    key: str
    dtype: str | None
    count: int
    device: str
    offset: int = 0
    block_count: int = 0
    inline: bytes | None = None
    """The bytes themselves, for values that lie inside the pickle (NumPy arrays)."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TensorRecord:
    """A strided view of a storage; offset and stride count values. Nothing is checked yet."""

    storage: StorageRecord
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Opaque:
    """A dict key that is not a string or small number; equal to itself alone.

    Hashing such keys is what hostile pickles attack: a tuple nested a million deep, or one whose hash takes hours.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    # Beside the weights only: tensors of these types are not built.
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
}
ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one value of the types that tensors are built of."""
SHARD = "shard of a DTensor"
"""Kind of a tensor that holds one process's part."""
OTHER_ITEM_BYTES = {"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4}


def storage_dtype(kind: Any) -> str | None:
    """Return the dtype of a storage class such as `torch.cuda.FloatStorage`; None for untyped storages.

    Raises:
        RefusedError: it is no storage class of torch.
    """
    if isinstance(kind, Global) and kind.module in ("torch", "torch.cuda", "torch.storage"):
        if kind.name == "UntypedStorage":
            return None
        if kind.name in STORAGE_DTYPES:
            return STORAGE_DTYPES[kind.name]
    raise RefusedError(
        f"holds a tensor storage of kind {_kind_of(kind)}",
        expected="one of " + ", ".join(sorted(set(ITEM_BYTES))),
        next_step=_SAVE_FLOATS,
    )


def named(module: Any, name: Any) -> Global:
    """Return the inert name for a class or function that a pickle mentions.

    Raises:
        RefusedError: the name belongs to what runs or loads something (see `is_harmless`).
    """
    if not isinstance(module, str) or not isinstance(name, str) or max(len(module), len(name)) > _MAX_NAME_LENGTH:
        raise RefusedError("is damaged: a class in its pickle has no valid name", next_step=_AGAIN)
    # Protocols 0 to 2, which torch.save writes, have the names of Python 2.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    if not is_harmless(module, name):
        raise RefusedError(
            f"wants to use {Global(module, name)} while it is read",
            expected="only tensors, plain values and network modules",
            next_step=_UNTRUSTED,
        )
    return Global(module, name)


def rebuilt(function: Any, arguments: Any) -> Any:
    """Return what a pickle's call `function(*arguments)` describes, without making the call.

    Tensors and plain containers are rebuilt by the functions below; every other call is a `Record` of its name and
    arguments.

    Raises:
        RefusedError: the call is not one of a named function, or its arguments make no sense.
    """
    if isinstance(function, Record):  # an enumeration nested in a class: getattr(Class, "Mode")("fast")
        return Record(function.kind, (arguments,))
    if not isinstance(function, Global):
        raise RefusedError("asks for a call of something that is not a named function", next_step=_UNTRUSTED)
    if not isinstance(arguments, tuple):
        raise RefusedError(f"is damaged: the arguments of {function} are not a tuple", next_step=_AGAIN)
    rebuild = _REBUILDERS.get((function.module, function.name))
    if rebuild is not None:
        return rebuild(arguments)
    if function.module == "torch._utils" and function.name.startswith("_rebuild_"):
        return _unreadable(function.name.removeprefix("_rebuild_").replace("_", " "))
    return Record(function, arguments)


def instance(kind: Any, arguments: Any) -> Any:
    """Return the inert record for `kind.__new__(kind, *arguments)`.

    Raises:
        RefusedError: `kind` is not a name.
    """
    if not isinstance(kind, Global):
        raise RefusedError("asks for an instance of something that is not a named class", next_step=_UNTRUSTED)
    if not isinstance(arguments, tuple):
        raise RefusedError(f"is damaged: the arguments of {kind} are not a tuple", next_step=_AGAIN)
    if kind.module == "collections" and kind.name in ("OrderedDict", "defaultdict", "Counter"):
        return {}
    return Record(kind, arguments)


def dict_key(value: Any) -> Any:
    """Return a key that is safe and fast to hash: the value itself if it is a string or a small integer."""
    if type(value) in (str, bytes, bool, type(None)) or (type(value) is int and -(1 << 60) < value < 1 << 60):
        return value
    return Opaque(value)


def _kind_of(value: Any) -> str:
    """Describe a value without looking inside: printing a nested one may take forever."""
    return str(value) if isinstance(value, Global) else type(value).__name__


# ----------------------------------------------------------------------------------------------------------------------
# The calls that a checkpoint may ask for


def _tensor_v1(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, shape, stride = _counted(arguments, 4, 4, "_rebuild_tensor")
    return _tensor(storage, None, offset, shape, stride)


def _tensor_v2(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, shape, stride, *_ = _counted(arguments, 6, 7, "_rebuild_tensor_v2")
    if len(arguments) == 7 and isinstance(arguments[6], dict) and (arguments[6].get("conj") or arguments[6].get("neg")):
        return _unreadable("lazily negated or conjugated view")
    return _tensor(storage, None, offset, shape, stride)


def _tensor_v3(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, shape, stride, _, _, dtype, *_ = _counted(arguments, 7, 8, "_rebuild_tensor_v3")
    if not isinstance(dtype, Global) or dtype.module != "torch":
        raise RefusedError(f"is damaged: a tensor has the dtype {_kind_of(dtype)}", next_step=_AGAIN)
    return _tensor(storage, dtype.name, offset, shape, stride)


def _unreadable(kind: str) -> TensorRecord:
    """Return a tensor whose values are not read (sparse, quantized, ...); refused if it is part of the network."""
    return TensorRecord(StorageRecord("", None, 0, "cpu"), shown(kind, 32), 0, (), ())


def _tensor(storage: Any, dtype: str | None, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    if isinstance(storage, Record) and storage.kind.name == "_load_from_bytes":
        return _unreadable("nested torch.save")
    if not isinstance(storage, StorageRecord):
        raise RefusedError("is damaged: a tensor has no storage", next_step=_AGAIN)
    dtype = dtype or storage.dtype
    if dtype is None:
        raise RefusedError("is damaged: a tensor over raw bytes has no dtype", next_step=_AGAIN)
    if type(offset) is not int or not _integers(shape) or not _integers(stride):
        raise RefusedError("is damaged: a tensor's offset, shape or stride is not made of integers", next_step=_AGAIN)
    return TensorRecord(storage, dtype, offset, tuple(shape), tuple(stride))


def _integers(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and len(values) <= 16 and all(type(value) is int for value in values)


def _first(arguments: tuple[Any, ...]) -> Any:
    """A parameter or 0.3-era variable is its data."""
    if not arguments:
        return Record(Global("torch.nn.parameter", "Parameter"))
    return arguments[0]


def _from_type(arguments: tuple[Any, ...]) -> Any:
    """A tensor of a subclass, or with attributes: the tensor alone."""
    function, kind, inner, state = _counted(arguments, 4, 4, "_rebuild_from_type_v2")
    if isinstance(kind, Global) and kind.name == "DTensor":
        return _distributed_tensor(inner, state)
    if not isinstance(function, Global) or not function.name.startswith("_rebuild_tensor"):
        return _unreadable(f"tensor made by {_kind_of(function)}")
    return rebuilt(function, inner)


def _distributed_tensor(inner: Any, state: Any) -> TensorRecord:
    """A DTensor that torch.save wrote: this process's part, which is the whole tensor if nothing was sharded."""
    slots = state[1] if isinstance(state, tuple) and len(state) == 2 else None
    local = slots.get("_local_tensor") if isinstance(slots, dict) else None
    size = inner[2] if isinstance(inner, tuple) and len(inner) > 2 else None
    if isinstance(local, TensorRecord) and isinstance(size, (tuple, list)) and local.shape == tuple(size):
        return local
    return _unreadable(SHARD)


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Python 3 fills the dict afterwards; Python 2 passes a list of pairs.

    The list is emptied, as no honest pickle uses it twice: one that makes a million dicts of one long list ends soon.
    """
    if not arguments:
        return {}
    source = arguments[0]
    if isinstance(source, dict):
        return source
    if not isinstance(source, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in source):
        raise RefusedError("is damaged: an OrderedDict is not made from pairs", next_step=_AGAIN)
    made = {dict_key(key): value for key, value in source}
    source.clear()
    return made


def _default_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    return {}


def _first_sequence(arguments: tuple[Any, ...]) -> Any:
    """A set or torch.Size is the list or tuple it is made from, uncopied."""
    if arguments and not isinstance(arguments[0], (list, tuple)):
        raise RefusedError("is damaged: a set or size is not made from a list", next_step=_AGAIN)
    return arguments[0] if arguments else ()


def _old_style_instance(arguments: tuple[Any, ...]) -> Any:
    return instance(_counted(arguments, 3, 3, "copyreg._reconstructor")[0], ())


def _latin1_bytes(arguments: tuple[Any, ...]) -> Any:
    """Python 3 writes bytes this way for Python 2: `_codecs.encode(text, "latin1")`. They stay text here."""
    text, codec = _counted(arguments, 2, 2, "_codecs.encode")
    if isinstance(text, str) and codec in ("latin1", "latin-1"):
        return text
    return Record(Global("_codecs", "encode"), arguments)


def _numpy_scalar(arguments: tuple[Any, ...]) -> Any:
    """A NumPy number (`best_psnr` in training checkpoints) is a Python number; other kinds stay a record."""
    kind = arguments[0].arguments if arguments and isinstance(arguments[0], Record) else ()
    code = kind[0] if kind and isinstance(kind[0], str) else ""
    data = arguments[1] if len(arguments) > 1 else None
    formats = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}
    if code in formats and isinstance(data, (bytes, str)) and len(data) == struct.calcsize(formats[code]):
        packed = data if isinstance(data, bytes) else data.encode("latin-1", "replace")
        return struct.unpack(formats[code], packed)[0]
    return Record(Global("numpy", "scalar"), arguments)


def _counted(arguments: tuple[Any, ...], minimum: int, maximum: int, what: str) -> tuple[Any, ...]:
    if not minimum <= len(arguments) <= maximum:
        raise RefusedError(
            f"is damaged: {what} has {len(arguments)} arguments", expected=f"{minimum} to {maximum}", next_step=_AGAIN
        )
    return arguments


_REBUILDERS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): _first,
    ("torch.autograd.variable", "Variable"): _first,
    ("torch", "Size"): _first_sequence,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "set"): _first_sequence,
    ("builtins", "frozenset"): _first_sequence,
    ("copyreg", "_reconstructor"): _old_style_instance,
    ("_codecs", "encode"): _latin1_bytes,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
