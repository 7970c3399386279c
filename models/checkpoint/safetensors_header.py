"""The header of a safetensors file: which tensor lies where. Format: https://huggingface.co/docs/safetensors

Eight bytes with the header's length, the header as JSON, then the tensors' bytes without gaps or overlaps. Whoever
believes a header that breaks these rules can be made to read anything or to allocate any amount.
"""

import json
from dataclasses import dataclass
from typing import Any

from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, StorageRecord, TensorRecord

MOST_HEADER_BYTES = 4 * 1024**2
"""A default-size RCAN has 0.2 MB."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Header:
    """Tensors by name, the place (offset, length in bytes) of each in the file, and the free metadata."""

    tensors: dict[str, TensorRecord]
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]


def read_header(file: FileBytes) -> Header:
    """Read and check the header.

    Raises:
        RefusedError: it breaks a rule of the format, or has a dtype that no supported network uses.
    """
    length = int.from_bytes(file.read(0, 8, "safetensors header"), "little")
    if length > MOST_HEADER_BYTES:
        raise RefusedError(f"claims a safetensors header of {length} bytes", expected=f"at most {MOST_HEADER_BYTES}")
    document = _json_object(file.read(8, length, "safetensors header"))
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RefusedError("has safetensors metadata that is not text by name", next_step=_AGAIN)
    tensors: dict[str, TensorRecord] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, description in document.items():
        tensors[name], places[name] = _tensor(name, description, data_start=8 + length)
    _check_places(places, start=8 + length, end=file.size)
    return Header(tensors, places, metadata)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RefusedError("has a safetensors header that is not JSON", next_step=_AGAIN) from error
    if not isinstance(document, dict):
        raise RefusedError("has a safetensors header that is not a JSON object", next_step=_AGAIN)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise RefusedError("has a safetensors header that names something twice", next_step=_AGAIN)
    return made


def _tensor(name: str, description: Any, data_start: int) -> tuple[TensorRecord, tuple[int, int]]:
    try:
        code, shape, (begin, end) = description["dtype"], description["shape"], description["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise RefusedError(f"describes tensor {shown(name)} without dtype, shape or place", next_step=_AGAIN) from None
    if not isinstance(code, str) or code not in _DTYPES:
        found = shown(code) if isinstance(code, str) else "that is not a name"
        raise RefusedError(f"has tensor {shown(name)} of dtype {found}", expected="one of " + ", ".join(_DTYPES))
    integers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= 16 else [None]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in integers) or begin > end:
        raise RefusedError(f"gives tensor {shown(name)} an impossible shape or place", next_step=_AGAIN)
    count = 1
    for size in shape:
        count *= size
    if count * ITEM_BYTES[_DTYPES[code]] != end - begin:
        raise RefusedError(f"has tensor {shown(name)} whose shape and number of bytes disagree", next_step=_AGAIN)
    storage = StorageRecord(name, _DTYPES[code], count, "cpu", 0, count)
    record = TensorRecord(storage, _DTYPES[code], 0, tuple(shape), _contiguous(shape))
    return record, (data_start + begin, end - begin)


def _contiguous(shape: list[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _check_places(places: dict[str, tuple[int, int]], start: int, end: int) -> None:
    position = start
    for name, (offset, length) in sorted(places.items(), key=lambda item: item[1]):
        if offset != position:
            raise RefusedError(f"has tensor {shown(name)} that overlaps another or leaves a gap", next_step=_AGAIN)
        position += length
    if position != end:
        raise RefusedError(
            f"is truncated or damaged: its tensors end at byte {position}, the file has {end} bytes",
            next_step=_AGAIN,
        )
