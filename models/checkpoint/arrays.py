"""NumPy arrays as tensor records: pickled arrays, and the .npy entries of an .npz archive."""

import io
import math
import tokenize
import warnings
from typing import Any

import numpy as np

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, Record, StorageRecord, TensorRecord

_RECONSTRUCT = ("numpy.core.multiarray", "numpy._core.multiarray")
_FROM_BUFFER = ("numpy.core.numeric", "numpy._core.numeric")
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,  # ast.literal_eval of deeply nested text
    OverflowError,
)
_AGAIN = "copy or download the file again"


def tensor_of_array(value: Any) -> TensorRecord | None:
    """Return a pickled NumPy array as a tensor record; None if the value is something else."""
    if not isinstance(value, Record):
        return None
    kind, state = value.kind, value.state
    if kind.module in _RECONSTRUCT and kind.name == "_reconstruct" and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, column_major, data = state
        return _tensor(shape, dtype, column_major, data)
    if kind.module in _FROM_BUFFER and kind.name == "_frombuffer" and len(value.arguments) == 4:
        data, dtype, shape, order = value.arguments
        return _tensor(shape, dtype, order == "F", data)
    return None


def tensor_of_npy(name: str, data: bytes) -> TensorRecord:
    """Return the array of one .npy file.

    Raises:
        RefusedError: it has no valid header, or holds Python objects.
    """
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers of Python 2
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(stream)
    except _DAMAGE as error:
        raise RefusedError(f"has an array {shown(name)} without a valid header", next_step=_AGAIN) from error
    return _record(shape, _dtype_name(dtype), column_major, data[stream.tell() :])


def _tensor(shape: Any, dtype: Any, column_major: Any, data: Any) -> TensorRecord | None:
    if isinstance(data, str):  # protocols 0 to 2 write bytes as latin-1 text
        data = data.encode("latin-1", "replace")
    code = dtype.arguments[0] if isinstance(dtype, Record) and dtype.arguments else None
    order = dtype.state[1] if isinstance(dtype, Record) and isinstance(dtype.state, tuple) and dtype.state[1:] else "="
    sizes_fit = isinstance(shape, (tuple, list)) and len(shape) <= 16 and all(type(size) is int for size in shape)
    if not isinstance(data, bytes) or not isinstance(code, str) or not sizes_fit:
        return None
    return _record(shape, _name_of_code(code) if order != ">" else f"big-endian {shown(code, 8)}", column_major, data)


def _name_of_code(code: str) -> str:
    try:
        return _dtype_name(np.dtype(code))
    except (TypeError, ValueError):
        return shown(code, 16)


def _dtype_name(dtype: Any) -> str:
    name = shown(getattr(dtype, "name", dtype), 16)
    return f"big-endian {name}" if getattr(dtype, "byteorder", "=") == ">" else name


def _record(shape: Any, dtype: str, column_major: Any, data: bytes) -> TensorRecord:
    """Return a record whose values are the bytes given; a dtype that is not built is refused if it is needed."""
    shape = tuple(shape)
    if dtype not in ITEM_BYTES:
        return TensorRecord(StorageRecord("", None, 0, "cpu"), dtype, 0, (), ())
    count = math.prod(shape)
    if not all(0 <= size < 1 << 48 for size in shape) or count * ITEM_BYTES[dtype] != len(data):
        raise RefusedError(f"holds an array of {len(data)} bytes whose shape needs another number", next_step=_AGAIN)
    stride = contiguous(shape[::-1])[::-1] if column_major else contiguous(shape)
    return TensorRecord(
        StorageRecord(f"array {id(data)}", dtype, count, "cpu", 0, count, data), dtype, 0, shape, stride
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in values, of a row-major tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
