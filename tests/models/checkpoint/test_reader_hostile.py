"""Hostile checkpoints: refused by name of what they were after, soon, in little memory, and nothing of them runs."""

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_fuzzing.pickles import (
    Call,
    Name,
    New,
    Persistent,
    Raw,
    Values,
    code_of,
    legacy_file,
    pickled,
    tensor,
    zip_file,
)
from peak_memory import environment

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.reader import read_checkpoint
from srdeploy.models.checkpoint.unpickler import MAX_OPERATIONS

SECONDS = 10.0
"""Of processor time: more than ten times what the slowest takes on a server of 2025; unbounded ones never end."""
MEGABYTES = 500

ORDERED = Call(Name("collections", "OrderedDict"), ())
STORAGE = Values("0", (1.0, 2.0, 3.0, 4.0))


def weight(legacy: bool = False) -> Call:
    return tensor(STORAGE.identifier(legacy=legacy), (4,))


def both(root_of: Callable[[bool], object]) -> dict[str, bytes]:
    return {
        "zip": zip_file(root_of(False), (STORAGE,)),
        "legacy": legacy_file(root_of(True), (STORAGE,)),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Code that wants to run: each tries to make the file named by the canary


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    made: dict[str, tuple[bytes, str]] = {}
    calls: dict[str, tuple[object, str]] = {
        "os.system": (Call(Name("os", "system"), (touch,)), "os.system"),
        "posix.system": (Call(Name("posix", "system"), (touch,)), "posix.system"),
        "builtins.eval": (Call(Name("builtins", "eval"), (python,)), "builtins.eval"),
        "python 2 eval": (Call(Name("__builtin__", "eval"), (python,)), "builtins.eval"),
        "builtins.exec": (Call(Name("builtins", "exec"), (python,)), "builtins.exec"),
        "subprocess.Popen by instance": (New(Name("subprocess", "Popen"), (touch,)), "subprocess.Popen"),
        "nested in arguments": (
            Call(Name("torch._utils", "_rebuild_parameter"), (Call(Name("os", "system"), (touch,)), True, ORDERED)),
            "os.system",
        ),
        "getattr to reach it": (
            Call(Call(Name("builtins", "getattr"), (Name("os", "path"), "system")), (touch,)),
            "os.path",
        ),
        "a dotted name": (Call(Name("torch.serialization", "os.system"), (touch,)), "torch.serialization.os.system"),
        "partial": (Call(Name("functools", "partial"), (Name("os", "system"), touch)), "os.system"),
        "torch.hub": (Call(Name("torch.hub", "load"), ("x", "y")), "torch.hub.load"),
        "rebuild with a function": (
            Call(
                Name("torch._tensor", "_rebuild_from_type_v2"), (Name("torch.hub", "load"), Name("a", "b"), ("x",), {})
            ),
            "torch.hub.load",
        ),
        "as a storage class": (tensor(Persistent(("storage", Name("os", "system"), "0", touch, 4)), (4,)), "os.system"),
        "in a module's state": (
            New(Name("net", "Net"), (), {"_modules": {}, "_parameters": {}, "x": Call(Name("os", "system"), (touch,))}),
            "os.system",
        ),
    }
    for name, (root, blocked) in calls.items():
        made[f"{name}, zip"] = (zip_file({"weight": weight(), "bad": root}, (STORAGE,)), blocked)
        made[f"{name}, legacy"] = (legacy_file({"weight": weight(True), "bad": root}, (STORAGE,)), blocked)
    early = pickled(Call(Name("os", "system"), (touch,)))
    made["before the magic number"] = (early + legacy_file({"weight": weight(True)}, (STORAGE,)), "os.system")
    made["plain pickle"] = (early, "os.system")
    made["inst opcode"] = (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "")
    made["protocol 4"] = (
        b"\x80\x04" + code_of("os") + code_of("system") + b"\x93" + code_of((touch,)) + b"R.",
        "os.system",
    )
    return made


NAMES = list(attacks(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_and_the_blocked_name_is_shown(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    data, blocked = attacks(canary)[name]
    path = tmp_path / "evil.pth"
    path.write_bytes(data)

    with pytest.raises(InputError) as caught:
        read_checkpoint(path)

    assert blocked in str(caught.value)
    assert str(path) in str(caught.value)
    assert not canary.exists()


REAL = ["os.system, zip", "os.system, legacy", "builtins.eval, zip", "plain pickle", "protocol 4"]
LOAD_FOR_REAL = """
import pickle, sys, torch
for path in sys.argv[1:]:
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pickle.load(open(path, "rb"))
"""


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python's own unpickler does run them: without this, the test above would prove nothing."""
    canaries = [tmp_path / f"canary{index}" for index in range(len(REAL))]
    paths = [tmp_path / f"evil{index}.pth" for index in range(len(REAL))]
    for name, canary, path in zip(REAL, canaries, paths, strict=True):
        path.write_bytes(attacks(canary)[name][0])

    subprocess.run([sys.executable, "-c", LOAD_FOR_REAL, *paths], capture_output=True, check=False)

    assert [canary.exists() for canary in canaries] == [True] * len(REAL)


# ----------------------------------------------------------------------------------------------------------------------
# Files that want time or memory


def _repeated(code: bytes, size: int = 2 * MAX_OPERATIONS) -> bytes:
    return code * (size // len(code))


def _doubling_list() -> object:
    """A "billion laughs" list: 100 levels, each holding the one before it ten times."""
    level = b"](K\x01e" + b"q\x00"
    for _ in range(100):
        level += b"](" + b"h\x00" * 10 + b"eq\x00"
    return Raw(level)


def _doubling_modules() -> object:
    """A network of 30 levels, each of which has the one below it twice."""
    code = code_of(New(Name("net", "Leaf"), (), {"_modules": {}, "_parameters": {}})) + b"q\x00"
    for _ in range(30):
        children = Raw(b"}(" + code_of("a") + b"h\x00" + code_of("b") + b"h\x00" + b"u")
        code += code_of(New(Name("net", "Net"), (), {"_modules": children, "_parameters": {}})) + b"q\x00"
    return Raw(code)


def _module_in_itself() -> object:
    """A network whose child is the network."""
    children = Raw(b"}" + code_of("a") + b"h\x00s")
    state = code_of({"_modules": children, "_parameters": {}})
    return Raw(code_of(New(Name("net", "Net"))) + b"q\x00" + state + b"b")


def _dict_in_itself() -> object:
    return Raw(b"}q\x00" + code_of("state_dict") + b"h\x00s" + code_of("model") + b"h\x00s")


def _doubling_wrappers() -> object:
    """Wrappers five deep in which each known key leads to the same dict of the next level."""
    code = code_of({f"weight{index}": index for index in range(20_000)}) + b"q\x00"
    for _ in range(5):
        keys = ("state_dict", "params", "model", "net", "ema", "params_ema", *(f"x{index}" for index in range(5000)))
        code += b"}(" + b"".join(code_of(key) + b"h\x00" for key in keys) + b"uq\x00"
    return Raw(code)


def _deep_tuple() -> object:
    return Raw(b"N" + b"\x85" * 250_000)


def _deep_dicts() -> object:
    return Raw(_repeated(b"}" + code_of("state_dict"), 200_000) + b"N" + b"s" * (200_000 // 16 - 1))


def _endless_ordered_dicts() -> object:
    """Many OrderedDicts, each made of the same long list of pairs."""
    pairs = b"](" + b"".join(b"]K\x01aK\x01a" for _ in range(20_000)) + b"eq\x00"
    call = code_of(Name("collections", "OrderedDict")) + b"q\x010"
    return Raw(pairs + b"0" + call + b"(" + b"h\x01h\x00\x85R" * 50_000 + b"t")


def _long_text_in_many_places() -> object:
    text = code_of("k" * (8 << 20)) + b"q\x000"
    return Raw(text + b"](" + b"}h\x00Ns" * 100_000 + b"e")


def _colliding_keys() -> object:
    """Integers that all hash to the same value."""
    step = 2**61 - 1
    return Raw(b"}(" + b"".join(code_of(step * index) + b"N" for index in range(1, 100_000)) + b"u")


def _huge_storage(count: int) -> object:
    return {"weight": tensor(Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", count)), (count,))}


def _huge_legacy(count: int) -> bytes:
    identifier = ("storage", Name("torch", "FloatStorage"), "0", "cpu", count, None)
    root = {"weight": tensor(Persistent(identifier), (count,))}
    return legacy_file(root)[: -len(pickled([]))] + pickled(["0"]) + struct.pack("<q", count) + bytes(64)


def _zip_bomb(size: int) -> bytes:
    """A well-formed archive whose one storage is `size` zero bytes, deflated."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", pickled(_huge_storage(size // 4)))
        with archive.open("a/data/0", "w", force_zip64=True) as entry:
            for _ in range(size // (1 << 24)):
                entry.write(bytes(1 << 24))
    return stream.getvalue()


def _lying_bomb(claimed: int) -> bytes:
    """The directory claims `claimed` bytes for an entry of 1 MB, deflated."""
    data = _zip_bomb(1 << 24)
    return data.replace(struct.pack("<I", 1 << 24), struct.pack("<I", claimed))


def _shared_bytes() -> bytes:
    """Two thousand names, each a tensor over the whole of the same storage."""
    values = Values("0", (0.0,) * 50_000)
    one = code_of(tensor(values.identifier(legacy=False), (50_000,))) + b"q\x000"
    root = Raw(one + b"}(" + b"".join(code_of(f"w{index}") + b"h\x00" for index in range(2000)) + b"u")
    return zip_file(root, (values,))


def _overlapping_entries() -> bytes:
    """A thousand directory entries for the same stored bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickled({"weight": weight()}))
        archive.writestr("a/data/0000", bytes(1 << 20))
    data = stream.getvalue()
    start = data.rfind(b"PK\x01\x02")
    end = data.rfind(b"PK\x05\x06")
    entry = data[start:end]
    copies = b"".join(entry.replace(b"a/data/0000", b"a/data/%04d" % index) for index in range(1000))
    tail = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, 1001, 1001, start - data.find(b"PK\x01\x02") + len(copies), 0, 0
    )
    first = data.find(b"PK\x01\x02")
    tail = tail[:16] + struct.pack("<I", first) + tail[20:]
    return data[:first] + data[first:start] + copies + tail


def _many_entries(count: int) -> bytes:
    name = b"x"
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    directory = entry * count
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return b"PK\x03\x04" + directory + end64 + locator + end


def _safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


EXPENSIVE: dict[str, tuple[Callable[[], bytes], str]] = {
    "list that doubles": (lambda: zip_file(_doubling_list()), "holds no network"),
    "modules that double": (lambda: zip_file(_doubling_modules()), "endlessly many parts"),
    "module in itself": (lambda: zip_file(_module_in_itself()), "contains itself"),
    "dict in itself": (lambda: zip_file(_dict_in_itself()), "holds no network"),
    "wrappers that double": (lambda: zip_file(_doubling_wrappers()), "holds no network"),
    "tuple nested deep": (lambda: zip_file(_deep_tuple()), "holds no network"),
    "dicts nested deep": (lambda: zip_file(_deep_dicts()), "holds no network"),
    "deep key": (lambda: zip_file(Raw(b"}" + b"N" + b"\x85" * 250_000 + b"Ns")), "holds no network"),
    "one list, many dicts": (lambda: zip_file(_endless_ordered_dicts()), "holds no network"),
    "one text, many places": (lambda: zip_file(_long_text_in_many_places()), "holds no network"),
    "colliding keys": (lambda: zip_file(_colliding_keys()), "holds no network"),
    "memo of a million": (lambda: zip_file(Raw(b"N" + _repeated(b"\x94", 4_000_000))), "operations"),
    "stack of a million": (lambda: zip_file(Raw(_repeated(b"}", 4_000_000))), "operations"),
    "marks": (lambda: zip_file(Raw(_repeated(b"(", 4_000_000))), "operations"),
    "legacy stack": (lambda: legacy_file(Raw(_repeated(b"]", 4_000_000))), "operations"),
    "text claimed 16 EB": (lambda: zip_file(Raw(b"\x8d" + b"\xff" * 8)), "byte count"),
    "integer of 200 bytes": (lambda: zip_file(Raw(b"\x8a\xc8" + b"\x01" * 200)), "integer of 200 bytes"),
    "storage claims 10 GB, zip": (
        lambda: zip_file(_huge_storage(2_500_000_000), (STORAGE,)),
        "lays 10000000000 bytes",
    ),
    "storage claims 10 GB, legacy": (lambda: _huge_legacy(2_500_000_000), "claims 10000000000 bytes"),
    "storage of negative size": (lambda: _huge_legacy(-5), "no valid size"),
    "storage of absurd size": (lambda: zip_file(_huge_storage(1 << 62)), "no valid size"),
    "zip bomb of 256 MB": (lambda: _zip_bomb(1 << 28), "lays"),
    "zip bomb that lies": (lambda: _lying_bomb(1 << 27), ""),
    "pickle bomb": (lambda: zip_file(Raw(bytes(160 << 20)), compression=zipfile.ZIP_DEFLATED), "at most"),
    "names over the same bytes": (_shared_bytes, "lays"),
    "overlapping entries": (_overlapping_entries, "overlaps another"),
    "two million entries": (lambda: _many_entries(2_000_000), "zip directory of 94000000 bytes"),
    "header of 2^60 bytes": (lambda: _safetensors(b"{}", length=1 << 60), "claims a safetensors header"),
    "header beyond the file": (lambda: _safetensors(b"{}", length=1 << 20), "is expected at bytes"),
    "header nested deep": (lambda: _safetensors(b'{"a":' + b"[" * 1_000_000), "recursion limit"),
    "header of many": (lambda: _safetensors(b'{"a":[' + b"{}," * 1_300_000 + b"{}]}"), "invalid JSON in header"),
    "header with a name twice": (lambda: _safetensors(b'{"a":{},"a":{}}'), "missing field `dtype`"),
    "offsets overlap": (
        lambda: _safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)),
        "invalid offset",
    ),
    "offsets leave a gap": (
        lambda: _safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 12, 20)}, bytes(20)),
        "invalid offset",
    ),
    "offsets beyond the file": (
        lambda: _safetensors({"a": _entry([1 << 30], 0, 1 << 32)}, bytes(8)),
        "not fully covered",
    ),
    "offsets negative": (lambda: _safetensors({"a": _entry([1], -4, 0)}, bytes(4)), "invalid value"),
    "shape of absurd size": (lambda: _safetensors({"a": _entry([1 << 62, 1 << 62], 0, 0)}), "overflow"),
    "empty of absurd size": (lambda: _safetensors({"a": _entry([0, 1 << 47, 1 << 47], 0, 0)}), "impossible shape"),
    "shape of a million axes": (lambda: _safetensors({"a": _entry([1] * 1_000_000, 0, 4)}, bytes(4)), "impossible"),
    "shape of booleans": (lambda: _safetensors({"a": _entry([True], 0, 4)}, bytes(4)), "invalid type"),
    "metadata nested deep": (
        lambda: _safetensors({"__metadata__": {"metadata": "[" * 500_000}, "a": _entry([1], 0, 4)}, bytes(4)),
        "not JSON",
    ),
}


def _bad_tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> dict[str, bytes]:
    return both(
        lambda legacy: {"weight": tensor(STORAGE.identifier(legacy=legacy), shape, stride=stride, offset=offset)}
    )


VIEWS = {
    "beyond the end": _bad_tensor((5,), (1,)),
    "offset beyond the end": _bad_tensor((2,), (1,), offset=3),
    "negative offset": _bad_tensor((2,), (1,), offset=-1),
    "negative stride": _bad_tensor((2,), (-1,), offset=3),
    "stride beyond the end": _bad_tensor((2, 2), (3, 2)),
    "stride of 2^62": _bad_tensor((2,), (1 << 62,)),
    "expanded": _bad_tensor((1 << 20, 1 << 20), (0, 0)),
    "a little expanded": _bad_tensor((5,), (0,)),
    "negative size": _bad_tensor((-1,), (1,)),
    "absurd size": _bad_tensor((1 << 62, 4), (4, 1)),
    "empty of absurd size": _bad_tensor((0, 1 << 40, 1 << 40), (1, 1, 1)),
    "fewer strides than sizes": _bad_tensor((2, 2), (1,)),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", VIEWS)
def test_tensors_that_leave_their_storage_are_refused(tmp_path: Path, name: str, container: str) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(VIEWS[name][container])

    with pytest.raises(InputError, match="tensor weight"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/passwd", "C:/evil", "a\\..\\evil", "a/data/.."],
)
def test_zip_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    stream = io.BytesIO(zip_file({"weight": weight()}, (STORAGE,)))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    path = tmp_path / "inner" / "evil.pth"
    path.parent.mkdir()
    path.write_bytes(stream.getvalue())

    with pytest.raises(InputError, match="stay inside the archive"):
        read_checkpoint(path)

    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("key", ["../../x", "/etc/passwd", "", "a\nb", "x" * 100])
def test_storage_keys_cannot_be_paths(tmp_path: Path, key: str) -> None:
    identifier = Persistent(("storage", Name("torch", "FloatStorage"), key, "cpu", 4))
    path = tmp_path / "evil.pth"
    path.write_bytes(zip_file({"weight": tensor(identifier, (4,))}, (STORAGE,)))

    with pytest.raises(InputError, match="key of a storage"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "", "x" * 1000, "\u202eevil"])
def test_tensor_names_that_would_upset_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    for container, data in both(lambda legacy: {name: weight(legacy)}).items():
        path = tmp_path / container
        path.write_bytes(data)
        with pytest.raises(InputError, match="names a tensor") as caught:
            read_checkpoint(path)
        assert str(caught.value).isprintable()


def test_a_wrong_crc_or_damaged_deflate_stream_is_refused(tmp_path: Path) -> None:
    data = zip_file({"weight": weight()}, (STORAGE,), compression=zipfile.ZIP_DEFLATED)
    stream = zlib.compress(pickled({"weight": weight()}), wbits=-15)
    at = data.find(stream[:16])
    assert at > 0
    path = tmp_path / "evil.pth"
    path.write_bytes(data[:at] + b"\xff" * 16 + data[at + 16 :])

    with pytest.raises(InputError, match="cannot be unpacked"):
        read_checkpoint(path)


def test_a_sparse_file_of_ten_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    with path.open("wb") as stream:
        stream.write(_huge_legacy(2_500_000_000))
        stream.truncate(10_000_000_000)

    with pytest.raises(InputError, match=r"has 9\.31 GiB"):
        read_checkpoint(path)


MEASURE = """
import json, sys, time
from pathlib import Path
from peak_memory import peak_kib
from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.reader import read_checkpoint
outcomes = {}
for path in map(Path, sys.argv[1:]):
    began = time.process_time()
    try:
        read_checkpoint(path)
        message = "was read"
    except InputError as error:
        message = str(error)
    outcomes[path.name] = [message, time.process_time() - began, peak_kib()]
print(json.dumps(outcomes))
"""


def test_bombs_end_soon_and_in_little_memory(tmp_path: Path) -> None:
    """All of them in one fresh process: its largest memory, PyTorch included, is that of the worst file."""
    for name, (make, _) in EXPENSIVE.items():
        (tmp_path / name).write_bytes(make())

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(tmp_path / name for name in EXPENSIVE)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=environment(),
    )

    outcomes = json.loads(done.stdout)
    assert {name: message for name, (message, _, _) in outcomes.items() if EXPENSIVE[name][1] not in message} == {}
    assert {name: message for name, (message, _, _) in outcomes.items() if message == "was read"} == {}
    assert {name: seconds for name, (_, seconds, _) in outcomes.items() if seconds > SECONDS} == {}
    assert {name: size // 1024 for name, (_, _, size) in outcomes.items() if size > MEGABYTES * 1024} == {}
