"""safetensors files. Format: https://huggingface.co/docs/safetensors

The library checks and reads the file from memory: its `safe_open` maps the file, and a program that shortens the file
meanwhile then ends the process with SIGBUS (seen with safetensors 0.8).
"""

import json
from typing import Any

from safetensors import SafetensorError, deserialize

from srdeploy.models.checkpoint.arrays import contiguous
from srdeploy.models.checkpoint.container import Container
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown
from srdeploy.models.checkpoint.inert import StorageRecord, TensorRecord

MAX_HEADER_BYTES = 4 * 1024**2
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


def open_safetensors(file: FileBytes) -> Container:
    """Open a safetensors file.

    Raises:
        RefusedError: it breaks a rule of the format.
    """
    length = int.from_bytes(file.read(0, 8, "safetensors header"), "little")
    if length > MAX_HEADER_BYTES:
        raise RefusedError(
            f"claims a safetensors header of {length} bytes", expected=f"at most {MAX_HEADER_BYTES}", next_step=_AGAIN
        )
    header = file.read(8, length, "safetensors header")
    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(file.read(0, file.size, "content"))  # type: ignore[no-untyped-call]
        metadata = json.loads(header).get("__metadata__", {})
    except (SafetensorError, ValueError, RecursionError) as error:
        raise RefusedError(f"is a damaged safetensors file ({shown(str(error), 120)})", next_step=_AGAIN) from error
    blocks = {name: description["data"] for name, description in found}
    tensors = {name: _record(name, description) for name, description in found}
    # safetensors.torch.save_model stores a shared tensor once; its other names are in the metadata.
    aliases = {name for name, target in metadata.items() if target in tensors and name not in tensors}
    tensors |= {name: tensors[metadata[name]] for name in aliases}
    metadata = {name: text for name, text in metadata.items() if name not in aliases}
    return Container("safetensors", tensors, lambda storage: blocks[storage.key], metadata)


def _record(name: str, description: dict[str, Any]) -> TensorRecord:
    """Return the record of a tensor; a dtype that no network uses is refused when it is built."""
    shape = tuple(description["shape"])
    dtype = _DTYPES.get(description["dtype"], shown(description["dtype"], 16))
    count = 1
    for size in shape[:16]:
        count *= size
    return TensorRecord(StorageRecord(name, dtype, count, "cpu", 0, count), dtype, 0, shape, contiguous(shape[:16]))
