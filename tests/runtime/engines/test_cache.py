"""The engine cache: hits, misses with a reason, one build for two processes, and a cache that cannot be used."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from srdeploy.cli.main import run
from srdeploy.core.manifest import manifest_path
from srdeploy.runtime.engines.cache import EngineCache, key_differences
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine
from srdeploy.runtime.engines.sidecar import key_sha256

GraphFactory = Callable[..., Path]


def build(onnx: Path, output: Path, **options: object) -> object:
    return build_engine(onnx, output, engine="onnxruntime", options=BuildOptions(**options))


def cached_folder() -> Path:
    (entry,) = EngineCache().entries()
    return entry.folder


def test_the_second_build_comes_from_the_cache(small_onnx: GraphFactory, tmp_path: Path) -> None:
    first = build(small_onnx(), tmp_path / "one")
    second = build(small_onnx(), tmp_path / "two")
    third = build(small_onnx(), tmp_path / "three", use_cache=False)

    assert (first.cached, second.cached, third.cached) == (False, True, False)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert second.manifest == first.manifest


def test_other_weights_are_another_key(small_onnx: GraphFactory, tmp_path: Path) -> None:
    build(small_onnx("a.onnx", seed=1), tmp_path / "one")

    result = build(small_onnx("b.onnx", seed=2), tmp_path / "two")

    assert not result.cached
    assert result.cache_reason == "not in the cache; the nearest engine in it differs in onnx_sha256"
    assert len(EngineCache().entries()) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "no-sidecar", "no-engine", "foreign-key"])
def test_a_damaged_entry_is_a_miss_with_a_reason(damage: str, small_onnx: GraphFactory, tmp_path: Path) -> None:
    good = build(small_onnx(), tmp_path / "one")
    folder = cached_folder()
    engine, sidecar = folder / "engine", manifest_path(folder / "engine")
    if damage == "flip":
        data = bytearray(engine.read_bytes())
        data[50] ^= 1
        engine.write_bytes(data)
    elif damage == "cut":
        engine.write_bytes(b"")
    elif damage == "no-sidecar":
        sidecar.unlink()
    elif damage == "no-engine":
        engine.unlink()
    else:
        document = json.loads(sidecar.read_text())
        document["details"]["key"]["precision"] = "int8"
        sidecar.write_text(json.dumps(document))
    (listed,) = EngineCache().entries(check=True)

    again = build(small_onnx(), tmp_path / "two")

    assert listed.problem
    assert not again.cached
    assert "damaged" in again.cache_reason or "another key" in again.cache_reason
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert EngineCache().lookup(good.manifest.details["key"]).engine is not None, "the rebuild repaired the entry"


def test_only_the_owner_may_read_the_cache(small_onnx: GraphFactory, tmp_path: Path) -> None:
    build(small_onnx(), tmp_path / "one")

    folder = cached_folder()
    assert stat.S_IMODE(EngineCache().root.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_cache_that_cannot_be_written_does_not_stop_a_build(
    small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path / "file"))

    result = build(small_onnx(), tmp_path / "one")

    assert not result.cached
    assert "cannot be used" in result.cache_reason
    assert (tmp_path / "one").exists()


@pytest.mark.tmpfs
def test_a_full_cache_disk_does_not_stop_a_build(
    small_onnx: GraphFactory, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "filler").write_bytes(b"x" * 120_000)
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(small_disk))

    build(small_onnx(features=32), tmp_path / "one")

    assert (tmp_path / "one").exists()
    assert EngineCache().entries() == []


@pytest.mark.tmpfs
def test_a_read_only_cache_does_not_stop_a_build(
    small_onnx: GraphFactory, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    result = build(small_onnx(), tmp_path / "one")

    assert "read-only" in result.cache_reason
    assert (tmp_path / "one").exists()


def test_two_processes_build_one_engine_once(small_onnx: GraphFactory, tmp_path: Path) -> None:
    path = small_onnx()
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from srdeploy.runtime.engines import onnxruntime_cpu, registry\n"
        "build = onnxruntime_cpu.build\n"
        "def slow(*arguments):\n"
        f"    with open({str(tmp_path / 'builds')!r}, 'a') as log: log.write('x')\n"
        "    time.sleep(1)\n"
        "    return build(*arguments)\n"
        "onnxruntime_cpu.build = slow\n"
        f"result = registry.build_engine(Path({str(path)!r}), Path(sys.argv[1]), engine='onnxruntime')\n"
        "print(result.cached)\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    answers = sorted(worker.communicate(timeout=120)[0].strip() for worker in workers)

    assert answers == ["False", "True"]
    assert (tmp_path / "builds").read_text() == "x"
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_gc_removes_damaged_old_and_excess_engines(small_onnx: GraphFactory, tmp_path: Path) -> None:
    cache = EngineCache()
    for seed in range(4):
        build(small_onnx(f"{seed}.onnx", seed=seed), tmp_path / str(seed))
    newest, second, third, oldest = cache.entries()
    (newest.folder / "engine").write_bytes(b"broken")
    month_ago = time.time() - 30 * 86400
    os.utime(oldest.folder, (month_ago, month_ago))

    would = cache.gc(older_than_days=7, dry_run=True)
    assert {entry.key_sha256 for entry in would} == {newest.key_sha256, oldest.key_sha256}
    assert len(cache.entries()) == 4

    cache.gc(older_than_days=7)
    assert {entry.key_sha256 for entry in cache.entries()} == {second.key_sha256, third.key_sha256}

    cache.gc(max_bytes=second.bytes)
    assert len(cache.entries()) == 1
    assert list(cache.root.glob(f"{third.key_sha256}*")) == [] or list(cache.root.glob(f"{second.key_sha256}*")) == []


def test_gc_keeps_what_another_process_has_made_since_it_looked(
    small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache()
    build(small_onnx(), tmp_path / "one")
    (entry,) = cache.entries()
    (entry.folder / "engine").write_bytes(b"broken")
    seen = cache.entries(check=True)
    build(small_onnx(), tmp_path / "two")  # finds it broken, and builds it again

    with monkeypatch.context() as patch:
        patch.setattr(EngineCache, "entries", lambda self, *, check=False: seen)
        removed = cache.gc()

    assert seen[0].problem is not None
    assert removed == []
    assert [each.problem for each in cache.entries(check=True)] == [None]


def test_an_entry_that_another_process_removes_meanwhile_is_none(
    small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache()
    for seed in range(3):
        build(small_onnx(f"{seed}.onnx", seed=seed), tmp_path / str(seed))
    first, second, third = cache.entries()
    stat, read_text = Path.stat, Path.read_text

    def stat_late(self: Path, **options: bool) -> os.stat_result:
        if self == second.folder / "engine":
            shutil.rmtree(second.folder)
        return stat(self, **options)

    def read_late(self: Path, encoding: str) -> str:
        if self.parent == third.folder:
            shutil.rmtree(third.folder)
        return read_text(self, encoding=encoding)

    monkeypatch.setattr(Path, "stat", stat_late)
    monkeypatch.setattr(Path, "read_text", read_late)

    assert [entry.key_sha256 for entry in cache.entries()] == [first.key_sha256]


def test_a_lock_file_is_removed_while_it_is_held(
    small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards it might be another process's, and a third one would make and hold one of the same name."""
    build(small_onnx(), tmp_path / "one")
    unlink, held = Path.unlink, []

    def looking(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".lock":
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(self, timeout=0).acquire()
            held.append(self.name)
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", looking)
    EngineCache().gc(max_bytes=0)

    assert len(held) == 1


@pytest.mark.parametrize(
    ("left", "right", "differences"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, {}),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, {"b.c": (2, 3)}),
        ({"a": 1}, {"b": 1}, {"a": (1, None), "b": (None, 1)}),
    ],
    ids=["same", "nested", "missing"],
)
def test_differences_name_the_field(left: dict, right: dict, differences: dict) -> None:
    assert key_differences(left, right) == differences
    assert (key_sha256(left) == key_sha256(right)) == (not differences)


def test_key_hash_ignores_the_order_of_names() -> None:
    assert key_sha256({"a": 1, "b": 2}) == key_sha256({"b": 2, "a": 1})


class TestVerbs:
    """srdeploy cache ls, explain, gc and verify."""

    def test_ls_and_verify(self, small_onnx: GraphFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        build(small_onnx(), tmp_path / "one")

        assert run(["cache", "ls", "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)["entries"]
        assert entry["engine"] == "onnxruntime"
        assert run(["cache", "verify"]) == 0

        (cached_folder() / "engine").write_bytes(b"broken")
        assert run(["cache", "verify"]) == 3
        assert "1 of 1 cached engines are damaged" in capsys.readouterr().err
        assert run(["cache", "gc"]) == 0
        assert EngineCache().entries() == []

    def test_explain_names_the_field(
        self, small_onnx: GraphFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build(small_onnx("a.onnx", seed=1), tmp_path / "one")
        build(small_onnx("b.onnx", seed=2), tmp_path / "two", use_cache=False)

        assert run(["cache", "explain", str(tmp_path / "two"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert not document["hit"]
        assert list(document["differences"]) == ["onnx_sha256"]

        assert run(["cache", "explain", str(tmp_path / "one")]) == 0
        assert "hit: in the cache" in capsys.readouterr().err
        assert run(["cache", "explain", str(tmp_path / "two"), str(tmp_path / "one")]) == 0
        assert "onnx_sha256" in capsys.readouterr().err

    @pytest.mark.parametrize("size", ["much", "-1GiB", "5 PiB", "nan", "inf"])
    def test_wrong_sizes(self, size: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["cache", "gc", "--max-size", size]) == 2
        assert "expected a size such as" in capsys.readouterr().err
