"""What differs between TensorRT and TensorRT-RTX: headers, releases, GPUs, versions."""

from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.core.errors import CapabilityError
from srdeploy.core.manifest import Manifest
from srdeploy.runtime.engines.gpu import Gpu
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.products import parse_capability, version_numbers
from srdeploy.runtime.engines.tensorrt.rtx import RTX, describe_header


@pytest.mark.parametrize(
    ("data", "described"),
    [
        (b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + bytes(4) + bytes([0x08]) + bytes(40), ("1.7.1.116", ["8.9"])),
        (b"vtrt" + bytes(20) + bytes([1, 8, 0, 3]) + bytes(4) + bytes([0x7E]) + bytes(40),
         ("1.8.0.3", ["8.0", "8.6", "8.9", "12.0", "12.1"])),
        (b"vtrt" + bytes(10), None),
        (b"ftrt" + bytes(100), None),
    ],
    ids=["one-gpu", "portable", "short", "another-magic"],
)  # fmt: skip
def test_headers(data: bytes, described: tuple[str, list[str]] | None) -> None:
    wanted = described and {"version": described[0], "compute_capabilities": described[1]}

    assert describe_header(data) == wanted


HOPPER = Gpu("cuda:0", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30)
ADA = Gpu("cuda:0", "NVIDIA L4", (8, 9), 24 * 2**30)


def engine_for(**target: object) -> Engine:
    details = {
        "target": {"words": "a GPU", **target},
        "key": {"options": {"version_compatible": True}},
        "profiles": [{"min": [1, 3, 16, 16], "opt": [1, 3, 64, 64], "max": [4, 3, 128, 128]}],
    }
    manifest = Manifest(kind="engine", sha256="0" * 64, details=details, versions={"tensorrt": "10.16.1.11"})
    return Engine(Path("e.plan"), b"", manifest)


@pytest.mark.parametrize(
    ("check", "target", "found", "fits"),
    [
        (RTX.check_gpu, {"compute_capabilities": ["8.9"]}, ADA, True),
        (RTX.check_gpu, {"compute_capabilities": ["8.6", "12.0"]}, ADA, False),
        (RTX.check_gpu, {"compute_capabilities": []}, ADA, True),
        (RTX.check_gpu, {"compute_capabilities": []}, HOPPER, False),
        (FULL.check_gpu, {"compute_capability": "9.0"}, HOPPER, True),
        (FULL.check_gpu, {"compute_capability": "9.0"}, ADA, False),
        (FULL.check_gpu, {"compute_capability": "8.0", "hardware_compatibility": "x"}, ADA, True),
    ],
    ids=["rtx-same", "rtx-other", "rtx-portable", "rtx-hopper", "same", "other", "compatible"],
)
def test_an_engine_for_another_gpu_is_refused_with_both_named(
    check: Callable[..., None], target: dict[str, object], found: Gpu, fits: bool
) -> None:
    if fits:
        check(engine_for(**target), found)
        return
    with pytest.raises(CapabilityError, match=f"e.plan was built for .*; this GPU is {found.name} .*; build it again"):
        check(engine_for(**target), found)


@pytest.mark.parametrize("here", ["10.12.0.36", "11.4.0.106"])
def test_an_engine_of_another_tensorrt_release_is_refused_with_both_named(here: str) -> None:
    FULL.check_engine(engine_for(), "10.16.1.11")

    with pytest.raises(
        CapabilityError,
        match=rf"built with TensorRT 10\.16\.1\.11 for a GPU; TensorRT {here} is installed here; build it again",
    ):
        FULL.check_engine(engine_for(), here)


@pytest.mark.parametrize(
    ("text", "capability"), [("8.9", (8, 9)), ("89", (8, 9)), ("sm_120", (12, 0)), ("12.1", (12, 1))], ids=str
)
def test_compute_capabilities(text: str, capability: tuple[int, int]) -> None:
    assert parse_capability(text) == capability


@pytest.mark.parametrize("text", ["fast", "8.9.1", "", "8."], ids=repr)
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_capability(text)


def test_versions_compare_as_numbers() -> None:
    assert version_numbers("10.9.0.34") < version_numbers("10.12.0") < version_numbers("11.4.0.106")
