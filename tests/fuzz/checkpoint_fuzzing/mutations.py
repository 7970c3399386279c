"""Damage checkpoints: bytes, zip entries, safetensors headers, pickle opcodes, state dicts. All of it is seeded."""

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from checkpoint_fuzzing.pickles import code_of
from checkpoint_fuzzing.seeds import basicsr_rcan, official_rcan, random_state, torch_file, yjn870_srdensenet

INTEGERS = (0, 1, -1, 2, 7, 255, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), 10**30)
NAMES = (
    b"os\nsystem\n",
    b"builtins\neval\n",
    b"builtins\ngetattr\n",
    b"__builtin__\nset\n",
    b"collections\nOrderedDict\n",
    b"torch\nFloatStorage\n",
    b"torch\nByteStorage\n",
    b"torch\nload\n",
    b"torch._utils\n_rebuild_tensor\n",
    b"torch._utils\n_rebuild_tensor_v3\n",
    b"torch._utils\n_rebuild_parameter\n",
    b"torch._tensor\n_rebuild_from_type_v2\n",
    b"torch\nSize\n",
    b"numpy.core.multiarray\nscalar\n",
    b"copy_reg\n_reconstructor\n",
    b"_codecs\nencode\n",
    b"SR_DenseNet\nNet\n",
    b"functools\npartial\n",
    b"numpy\ndtype\n",
    b"numpy._core.multiarray\n_reconstruct\n",
    b"torch._utils\n_rebuild_qtensor\n",
)


def mutated(data: bytes, other: bytes, randomness: random.Random) -> tuple[str, bytes]:
    """Return the name of a mutation and its result; now and then several in a row."""
    names = []
    for _ in range(randomness.choice((1, 1, 1, 2, 4))):
        mutate = randomness.choice(_mutations_for(data))
        names.append(mutate.__name__.strip("_"))
        data = mutate(data, other, randomness)
    return "+".join(names), data


def _mutations_for(data: bytes) -> list["Mutation"]:
    if data.startswith(b"PK"):
        return [*_BYTES, *_ZIP * 4, *_STATE]
    if data[8:9] == b"{":
        return [*_BYTES, *_SAFETENSORS * 4, *_STATE]
    return [*_BYTES, *_STREAM * 8, *_STATE]


Mutation = Callable[[bytes, bytes, random.Random], bytes]


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


def _place(data: bytes, randomness: random.Random) -> int:
    """Choose a position; half of the time in the first or last few KB, where the structure lies."""
    if not data:
        return 0
    near = min(len(data), 6000)
    kind = randomness.random()
    if kind < 0.35:
        return randomness.randrange(near)
    return len(data) - 1 - randomness.randrange(near) if kind < 0.5 else randomness.randrange(len(data))


def _flip_bits(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(randomness.choice((1, 1, 2, 8)) if data else 0):
        changed[_place(data, randomness)] ^= 1 << randomness.randrange(8)
    return bytes(changed)


def _set_bytes(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(randomness.choice((1, 1, 2, 8)) if data else 0):
        changed[_place(data, randomness)] = randomness.choice((0, 1, 0x7F, 0x80, 0xFF, randomness.randrange(256)))
    return bytes(changed)


def _set_integer(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    size = randomness.choice((2, 4, 8))
    value = randomness.choice(INTEGERS) % (1 << 8 * size)
    at = _place(data, randomness)
    return data[:at] + value.to_bytes(size, randomness.choice(("little", "big"))) + data[at + size :]


def _truncate(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    return data[: _place(data, randomness)]


def _remove(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    at = _place(data, randomness)
    return data[:at] + data[at + randomness.choice((1, 2, 4, 8, 64, 4096)) :]


def _insert(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    at = _place(data, randomness)
    return data[:at] + randomness.randbytes(randomness.choice((1, 2, 4, 8, 64, 4096))) + data[at:]


def _repeat(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    at = _place(data, randomness)
    piece = data[at : at + randomness.choice((1, 2, 8, 64, 4096))]
    return data[:at] + piece * randomness.choice((2, 3, 100)) + data[at:]


def _splice(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    return data[: _place(data, randomness)] + other[_place(other, randomness) :]


def _wipe(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    at = _place(data, randomness)
    size = min(randomness.choice((1, 4, 64, 4096)), len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


_BYTES: list[Mutation] = [
    _flip_bits,
    _set_bytes,
    _set_integer,
    _truncate,
    _remove,
    _insert,
    _repeat,
    _splice,
    _wipe,
]


# ----------------------------------------------------------------------------------------------------------------------
# Pickle opcodes


def _pickle_operations(data: bytes) -> list[bytes]:
    """Split a pickle into the bytes of its operations; [] when it cannot be split."""
    try:
        starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    except Exception:  # whatever pickletools makes of a pickle that was damaged before
        return []
    ends = [*starts[1:], starts[-1] + 1] if starts else []
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def _mutated_operations(operations: list[bytes], randomness: random.Random) -> list[bytes]:
    changed = list(operations)
    for _ in range(randomness.choice((1, 1, 2, 5))):
        at = randomness.randrange(len(changed))
        kind = randomness.randrange(8)
        if kind == 0:
            del changed[at]
        elif kind == 1:
            changed.insert(at, changed[randomness.randrange(len(changed))])
        elif kind == 2:
            to = randomness.randrange(len(changed))
            changed[at], changed[to] = changed[to], changed[at]
        elif kind == 3:
            changed[at] = code_of(randomness.choice(INTEGERS))
        elif kind == 4:
            changed[at] = b"c" + randomness.choice(NAMES)
        elif kind == 5:
            changed[at] = randomness.choice(
                (b"(", b"0", b"1", b"2", b"R", b"b", b"o", b"t", b"u", b"s", b"e", b"Q", b"N")
            )
        elif kind == 6:
            changed[at] = code_of(randomness.choice(("", "weight", "..", "\x1b[2J", "a" * 5000, 1.5, True, (), [], {})))
        else:
            changed[at] = changed[randomness.randrange(len(changed))]
        if not changed:
            break
    return changed


def _change_stream(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    """Change operations in one of the five pickles of torch's older stream."""
    stream = io.BytesIO(data)
    ends = [0]
    try:
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            ends.append(stream.tell())
    except Exception:  # a stream that was damaged before
        return _flip_bits(data, other, randomness)
    which = randomness.choice((0, 1, 2, 3, 3, 3, 3, 4))
    operations = _pickle_operations(data[ends[which] : ends[which + 1]])
    changed = b"".join(_mutated_operations(operations, randomness)) if operations else b""
    return data[: ends[which]] + changed + data[ends[which + 1] :]


_STREAM: list[Mutation] = [_change_stream]


# ----------------------------------------------------------------------------------------------------------------------
# Zip archives


def _zip_entries(data: bytes) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # an archive that was damaged before
        return []


def _zipped(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two entries of one name are the point
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name, content in entries:
                archive.writestr(zipfile.ZipInfo(name), content, compression)  # without the time of day
    return stream.getvalue()


def _change_pickle_in_zip(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    entries = _zip_entries(data)
    changed = []
    for name, content in entries:
        operations = _pickle_operations(content) if name.endswith("data.pkl") else []
        if operations:
            content = b"".join(_mutated_operations(operations, randomness))
        changed.append((name, content))
    return _zipped(changed)


def _change_entries(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    entries = _zip_entries(data)
    if not entries:
        return _flip_bits(data, other, randomness)
    at = randomness.randrange(len(entries))
    name, content = entries[at]
    kind = randomness.randrange(6)
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries.append(entries[at])
    elif kind == 2:
        entries[at] = (
            randomness.choice(("../../etc/x", "/x", "C:/x", "a\\b", "x/data.pkl", "x/constants.pkl")),
            content,
        )
    elif kind == 3:
        entries[at] = (name, _truncate(content, b"", randomness))
    elif kind == 4:
        entries[at] = (name, content + randomness.randbytes(randomness.choice((1, 4, 1000))))
    else:
        return _zipped(entries, zipfile.ZIP_DEFLATED)
    return _zipped(entries)


def _change_directory(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    """Change a number in the zip directory."""
    at = data.rfind(b"PK\x01\x02")
    if at < 0:
        return _flip_bits(data, other, randomness)
    starts = [position for position in range(len(data)) if data.startswith(b"PK\x01\x02", position)][-200:]
    at = randomness.choice([*starts, max(data.rfind(b"PK\x05\x06"), 0)]) + randomness.randrange(4, 46, 2)
    return data[:at] + struct.pack("<I", randomness.choice(INTEGERS) % (1 << 32)) + data[at + 4 :]


_ZIP: list[Mutation] = [_change_pickle_in_zip, _change_pickle_in_zip, _change_entries, _change_directory]


# ----------------------------------------------------------------------------------------------------------------------
# safetensors headers


def _change_header(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if isinstance(header[name], dict)]
    except (ValueError, TypeError):
        names = []
    if not names:
        return _flip_bits(data, other, randomness)
    name = randomness.choice(names)
    kind = randomness.randrange(7)
    strange: Any = randomness.choice(
        [*INTEGERS, None, "x", [], {}, 1.5, True, [1, 2], [[[]]], "F32", "F8_E4M3", "\x1b[2J"]
    )
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[randomness.choice(("", "x", "../x", "\x1b[2J", "a" * 5000, "__metadata__"))] = header.pop(name)
    elif kind == 2:
        header[name] = strange
    elif kind == 3:
        header[name][randomness.choice(("dtype", "shape", "data_offsets"))] = strange
    elif kind == 4 and isinstance(header[name].get("shape"), list) and header[name]["shape"]:
        shape = header[name]["shape"]
        shape[randomness.randrange(len(shape))] = strange
    elif kind == 5 and isinstance(header[name].get("data_offsets"), list):
        offsets = header[name]["data_offsets"]
        if offsets:
            offsets[randomness.randrange(len(offsets))] = strange
    else:
        header["__metadata__"] = randomness.choice(
            (
                {"metadata": "{"},
                {"metadata": "[1]"},
                {"metadata": '{"scale": []}'},
                {"metadata": 3},
                [],
                "x",
                {"a": None},
            )
        )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


_SAFETENSORS: list[Mutation] = [_change_header]


# ----------------------------------------------------------------------------------------------------------------------
# State dicts: whole files whose tensors are wrong


def _change_state(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    shapes = randomness.choice((official_rcan, basicsr_rcan, yjn870_srdensenet))()
    state: dict[str, Any] = dict(random_state(shapes))
    for _ in range(randomness.choice((1, 1, 2, 6))):
        name = randomness.choice(list(state))
        value = state[name]
        kind = randomness.randrange(5)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[name.replace("weight", "wait") + randomness.choice(("", ".x", "0"))] = value
        elif kind == 2:
            state[randomness.choice(list(state))] = value
        elif isinstance(value, torch.Tensor) and value.ndim:
            state[name] = randomness.choice(_STRANGE_TENSORS)(value)
        if not state:
            break
    wrapper = randomness.choice(("", "state_dict", "params", "model", "params_ema", "something"))
    return torch_file({wrapper: state} if wrapper else state, legacy=randomness.random() < 0.3)


_STRANGE_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda value: value[:-1],
    lambda value: value[..., None],
    lambda value: value.reshape(-1),
    lambda value: torch.empty(0),
    lambda value: value[:0],
    lambda value: torch.tensor(1.0),
    lambda value: value.to(torch.int64),
    lambda value: value.to(torch.bfloat16),
    lambda value: value.to(torch.float64),
    lambda value: value * float("nan"),
    lambda value: value * float("inf"),
    lambda value: value.transpose(0, -1),
    lambda value: torch.cat((value, value)),
    lambda value: value.new_zeros((1,) * 12),
    lambda value: [value],
    lambda value: "text",
    lambda value: None,
)
_STATE: list[Mutation] = [_change_state]
