"""The inert unpickler agrees with Python's on plain values of every protocol, and calls nothing for all others."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fuzzing.pickles import Call, Name, New, Persistent, Python2Text, Raw, code_of, pickled

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import Global, Record, TensorRecord
from srdeploy.models.checkpoint.unpickler import MAX_OPERATIONS, unpickle


def load(data: bytes) -> Any:
    value, end = unpickle(data, 0, lambda identifier: ("persistent", identifier))
    assert end == len(data)
    return value


PLAIN: dict[str, Any] = {
    "none": None,
    "booleans": [True, False],
    "small integers": [0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31)],
    "large integers": [2**31, 2**63, -(2**200), 0x1950A86A20F9469CFC6C],
    "floats": [0.0, -1.5, 1e300, float("inf")],
    "texts": ["", "weight", "Größe", "\U0001f600", "line\nbreak\\", "x" * 300],
    "bytes": [b"", b"abc", b"x" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": [1, {"b": (2, [3])}], 5: "five", None: 1},
    "shared": [[1, 2]] * 3,
    "many": list(range(3000)),
    "wide dict": {str(number): number for number in range(3000)},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_are_read_as_python_reads_them(name: str, protocol: int) -> None:
    value = PLAIN[name]
    if name == "bytes" and protocol < 3:
        pytest.skip("protocols 0 to 2 write bytes as a call of _codecs.encode")

    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_a_list_that_contains_itself_is_read(protocol: int) -> None:
    loop: list[Any] = []
    loop.append(loop)

    found = load(pickle.dumps(loop, protocol))

    assert found[0] is found


@pytest.mark.parametrize("protocol", range(6))
def test_sets_are_lists_so_that_nothing_is_hashed(protocol: int) -> None:
    assert sorted(load(pickle.dumps({3, 1, 2}, protocol))) == [1, 2, 3]


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_old_protocols_write_bytes_as_latin1_text(protocol: int) -> None:
    assert load(pickle.dumps(b"caf\xe9", protocol)) == "café"


def test_python_2_strings_are_latin1() -> None:
    assert load(pickled(Python2Text(bytes(range(256))))) == bytes(range(256)).decode("latin-1")
    assert load(b'S"it\'s"\n.') == "it's"


def test_unusual_keys_are_kept_apart_and_never_hashed() -> None:
    deep: bytes = b"K\x01" + b"\x85" * 200_000  # a tuple nested 200,000 deep: hash() of it would end the process
    code = b"\x80\x02}(" + deep + b"K\x02]K\x03u."

    assert len(load(code)) == 2


def test_a_class_that_exists_nowhere_becomes_a_record() -> None:
    found = load(pickled(New(Name("SR_DenseNet", "Net"), (1,), {"a": 2})))

    assert isinstance(found, Record)
    assert found.kind == Global("SR_DenseNet", "Net")
    assert found.arguments == (1,)
    assert found.state == {"a": 2}


def test_a_class_that_exists_is_neither_imported_nor_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_module.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    found = load(pickled(New(Name("canary_module", "Net"), (), {"a": 1})))

    assert isinstance(found, Record)
    assert "canary_module" not in sys.modules
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize(
    "code", [b"(icanary\nNet\n.", b"(ccanary\nNet\no.", b"\x80\x04\x8c\x06canary\x8c\x03Net\x93)}\x92."]
)
def test_instances_of_other_protocols_are_records_too(code: bytes) -> None:
    found = load(code)

    assert isinstance(found, Record)
    assert str(found.kind) == "canary.Net"


BLOCKED = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("pickle", "loads"),
    ("shutil", "rmtree"),
    ("operator", "methodcaller"),
    ("types", "CodeType"),
    ("_codecs", "lookup"),
    ("pathlib", "Path.unlink"),
    ("collections", "OrderedDict.__init__"),
]


@pytest.mark.parametrize(("module", "name"), BLOCKED, ids=[f"{module}.{name}" for module, name in BLOCKED])
@pytest.mark.parametrize("how", ["mention", "call", "new", "inst", "stack"])
def test_names_of_the_standard_library_are_refused_when_mentioned(module: str, name: str, how: str) -> None:
    code = {
        "mention": pickled(Name(module, name)),
        "call": pickled(Call(Name(module, name), ("echo",))),
        "new": pickled(New(Name(module, name), ("echo",))),
        "inst": f"(S'echo'\ni{module}\n{name}\n.".encode(),
        "stack": b"\x80\x04" + code_of(module) + code_of(name) + b"\x93.",
    }[how]

    with pytest.raises(RefusedError) as caught:
        load(code)

    assert f"{module.replace('__builtin__', 'builtins')}.{name}" in caught.value.found


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.serialization", "os.system"),
        ("numpy.testing._private.utils", "runstring"),
        ("canary.os", "system"),
        ("canary", "os.path.join"),
    ],
)
def test_what_runs_or_loads_something_is_refused_in_any_package(module: str, name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        load(pickled(Call(Name(module, name), ("echo",))))

    assert f"{module}.{name}" in caught.value.found


CALLS = {
    "partial": Call(Name("functools", "partial"), (Name("torch.optim", "Adam"),)),
    "deque": Call(Name("collections", "deque"), ([1.0], 5)),
    "enumeration": Call(Name("project.options", "Mode"), ("fast",)),
    "enumeration in a class": Call(Call(Name("builtins", "getattr"), (Name("project", "Net"), "Mode")), (1,)),
    "time zone": Call(Name("datetime", "timezone"), (Call(Name("datetime", "timedelta"), (0, 0, 0)),)),
    "named zone": Call(Call(Name("builtins", "getattr"), (Name("zoneinfo", "ZoneInfo"), "_unpickle")), ("UTC", 1)),
    "namespace": Call(Name("types", "SimpleNamespace"), (), {"scale": 2}),
    "range": Call(Name("builtins", "range"), (0, 5, 1)),
    "slice": Call(Name("builtins", "slice"), (0, None, None)),
    "complex": Call(Name("builtins", "complex"), (1.0, 2.0)),
    "decimal": Call(Name("decimal", "Decimal"), ("0.5",)),
    "UUID": New(Name("uuid", "UUID"), (), {"int": 1 << 100}),
    "logger": Call(Name("logging", "getLogger"), ("train",)),
    "pattern": Call(Name("re", "_compile"), ("a+", 32)),
    "error": Call(Name("builtins", "ValueError"), ("diverged",)),
    "generator state": Call(Name("numpy.random._pickle", "__generator_ctor"), ("PCG64",)),
    "nested torch.save": Call(Name("torch.storage", "_load_from_bytes"), (b"x",)),
    "sparse tensor": Call(Name("torch._utils", "_rebuild_sparse_tensor"), (1, (2, 3))),
    "quantized tensor": Call(Name("torch._utils", "_rebuild_qtensor"), (1, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_harmless_calls_are_kept_unmade(name: str) -> None:
    assert isinstance(load(pickled(CALLS[name])), (Record, TensorRecord))


def test_a_call_of_a_function_that_exists_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary_function.py").write_text(f"def sing(path): open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    found = load(pickled(Call(Name("canary_function", "sing"), ("x",))))

    assert isinstance(found, Record)
    assert (found.kind, found.arguments) == (Global("canary_function", "sing"), ("x",))
    assert not canary.exists()
    assert "canary_function" not in sys.modules


def test_a_call_of_what_a_call_gave_is_refused() -> None:
    nested = Call(Call(Name("collections", "OrderedDict"), ()), ("echo",))

    with pytest.raises(RefusedError, match="not a named function"):
        load(pickled(nested))


def test_a_call_with_a_state_sets_no_attribute() -> None:
    """`__setstate__` on a rebuilt dict is ignored: state dicts carry `_metadata` that way."""
    found = load(pickled(Call(Name("collections", "OrderedDict"), (), {"__class__": 1})))

    assert found == {}


def test_persistent_ids_go_to_the_caller() -> None:
    assert load(pickled(Persistent(("storage", 1)))) == ("persistent", ("storage", 1))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "exhausted"),
        (b"\x80\x02", "exhausted"),
        (b"X\xff\xff\xff\xff", "expected 4294967295 bytes"),
        (b"\x8d" + b"\xff" * 8 + b".", "byte count"),
        (b"\x96" + b"\xff" * 7 + b"\x00.", "bytearray8"),
        (b"T\xff\xff\xff\xff.", "byte count < 0"),
        (b".", "pop from empty list"),
        (b"R.", "pop from empty list"),
        (b"t.", "pop from empty list"),
        (b"h\x05.", "not found at index 5"),
        (b"g7\n.", "not found at index 7"),
        (b"K\x01K\x02a.", "not a list"),
        (b"]K\x01K\x02s.", "not a dict"),
        (b"}(K\x01u.", "index out of range"),
        (b"X\x01\x00\x00\x00\xff.", "can't decode"),
        (b"S'abc\n.", "quote"),
        (b"Iabc\n.", "invalid literal"),
        (b"I" + b"9" * 10_000 + b"\n.", "4300 digits"),
        (b"Fabc\n.", "could not convert"),
        (b"\x8b\x00\x01\x00\x00" + b"\x01" * 256 + b".", "opcode LONG4"),
        (b"\x80\x09.", "protocol 9"),
        (b"Pname\n.", "opcode PERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x97.", "opcode NEXT_BUFFER"),
        (b"\xf0.", "unknown"),
        (b"c" + b"a" * 600 + b"\nNet\n.", "no valid name"),
        (b"c\xff\nNet\n.", "can't decode"),
        (b"K\x01K\x02\x93.", "requires str"),
        (b"K\x01)\x81.", "not a named class"),
        (b"ca\nNet\nK\x01\x81.", "not a tuple"),
        (b"(o.", "pop from empty list"),
    ],
)
def test_damage_is_named(code: bytes, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        load(code)


def test_the_number_of_operations_is_bounded() -> None:
    load(b"\x80\x02" + b"N0" * (MAX_OPERATIONS // 2 - 2) + b"N.")

    with pytest.raises(RefusedError, match="operations"):
        load(b"\x80\x02" + b"N0" * (MAX_OPERATIONS // 2) + b"N.")


def test_text_from_a_file_is_shown_without_control_characters() -> None:
    assert shown("weight") == "weight"
    assert shown("a\x1b[2Jb\n\ud800") == "a�[2Jb��"
    assert len(shown("x" * 1000)) == 80


def test_the_helpers_write_what_python_reads() -> None:
    """The test's own writer is checked against Python's reader, so that the tests above test what they say."""
    value = {"a": [1, 2.5, None, True, (2**40,), b"x"], "b": "text"}

    assert pickle.loads(pickled(value)) == value  # noqa: S301 - our own bytes
    assert pickle.loads(pickled(Raw(b"K\x01"))) == 1  # noqa: S301
