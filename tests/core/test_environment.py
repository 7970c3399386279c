"""What a number was measured on is read from the machine, and silence is the default of progress."""

import importlib.metadata
import json

import pytest

from srdeploy.core import environment
from srdeploy.core.environment import cpu_count, machine, memory_bytes, package_versions
from srdeploy.core.progress import SILENT


def test_versions_are_those_installed_and_missing_ones_are_omitted() -> None:
    versions = package_versions(["numpy", "no-such-distribution-zq"])

    assert versions == {"numpy": importlib.metadata.version("numpy")}


def test_the_machine_fits_into_json() -> None:
    facts = json.loads(json.dumps(machine()))

    assert facts["cpus"] == cpu_count() >= 1
    assert facts["memory_bytes"] == memory_bytes()
    assert facts["processor"]


def test_processor_and_flags_are_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nmodel name : Fast: 3 GHz\nflags : fpu avx2 avx512_vnni\n\nmodel name : Other\n"
    monkeypatch.setattr(environment, "_read", lambda path: text if path == "/proc/cpuinfo" else "performance\n")

    facts = machine()

    assert facts["cpu_flags"] == ["avx2", "avx512_vnni"]
    assert facts["governor"] == "performance"


def test_a_system_without_proc_still_gets_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: "")

    assert machine()["cpu_flags"] == []
    assert machine()["governor"] is None


def test_silent_progress_takes_every_call(capfd: pytest.CaptureFixture[str]) -> None:
    with SILENT.task("work", total=2) as advance:
        advance()
        advance(0.5, note="half")
    SILENT.note("done")

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "processor", "saturates"),
    [
        pytest.param("fpu avx2", "x86_64", True, id="AVX2 alone"),
        pytest.param("fpu avx2 avx512f", "x86_64", True, id="AVX-512 without VNNI"),
        pytest.param("fpu avx2 avx_vnni", "x86_64", False, id="AVX-VNNI"),
        pytest.param("fpu avx2 avx512f avx512_vnni", "AMD64", False, id="AVX-512 VNNI"),
        pytest.param("fp asimd", "aarch64", False, id="Arm"),
    ],
)
def test_which_processors_add_8_bit_products_in_16_bits(
    flags: str, processor: str, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: f"flags : {flags}\n")
    monkeypatch.setattr(environment.platform, "machine", lambda: processor)

    assert environment.int8_sums_saturate() is saturates
