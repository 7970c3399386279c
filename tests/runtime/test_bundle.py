"""A bundle opens only with the bytes its manifest names, and hands out the best engine that can run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.core.manifest import Source
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import (
    BundleEngine,
    Excluded,
    choose_engine,
    is_bundle,
    machine_obstacles,
    read_bundle,
    runnable_engines,
    write_bundle_manifest,
)
from srdeploy.runtime.signature import SIGNATURE, find_signature

CONTRACT = ModelContract(
    architecture="rcan",
    configuration={"groups": 2},
    scale=2,
    colours="rgb",
    precision=Precision.FP32,
    receptive_radius=None,
    macs_per_pixel=10.0,
    largest_tensor_per_pixel=64,
    checkpoint_sha256="00" * 32,
)
PLAN = BundleEngine("engines/rtx.plan", "tensorrt-rtx", Precision.FP16, verified=False)
INT8 = BundleEngine("engines/ov.bin", "openvino", Precision.INT8, True, 48.5, 3.25, 9.0)
FP32 = BundleEngine("engines/ort.onnx", "onnxruntime", Precision.FP32, True, float("inf"), 12.0, 2.5)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "net.srd"
    for entry in (PLAN, INT8, FP32):
        path = folder / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.file.encode())
        path.with_name(path.name + ".json").write_text("{}")
    (folder / "model.fp32.onnx").write_bytes(b"onnx")
    write_bundle_manifest(
        folder,
        contract=CONTRACT,
        checkpoint=Source("checkpoint", "net.pt", "00" * 32),
        engines=(PLAN, INT8, FP32),
        excluded=(Excluded("onnxruntime", Precision.INT8, "verify", "30.0 dB; expected 40.0 dB"),),
        details={"command": ["srdeploy", "deploy"]},
    )
    return folder


def test_a_bundle_reads_back(bundle: Path) -> None:
    opened = read_bundle(bundle)

    opened.verify()
    assert is_bundle(bundle)
    assert opened.contract == CONTRACT
    assert opened.engines == (PLAN, INT8, FP32)
    assert [entry.reason for entry in opened.excluded] == ["30.0 dB; expected 40.0 dB"]
    assert opened.manifest.details["command"] == ["srdeploy", "deploy"]
    assert opened.onnx().read_bytes() == b"onnx"
    assert opened.file("engines/ov.bin").read_bytes() == b"engines/ov.bin"
    assert "manifest.json" not in opened.files


def flip(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize("change", [flip, Path.unlink], ids=["changed", "missing"])
@pytest.mark.parametrize("name", ["engines/ov.bin", "engines/ov.bin.json"], ids=["engine", "sidecar"])
def test_an_engine_with_other_bytes_is_not_handed_out(bundle: Path, name: str, change: Callable[[Path], None]) -> None:
    change(bundle / name)
    opened = read_bundle(bundle)

    with pytest.raises(InputError, match=f"{name}"):
        opened.file("engines/ov.bin")
    with pytest.raises(InputError, match=f"{name}"):
        opened.verify()
    assert opened.file("engines/ort.onnx")  # the others stay usable


def test_a_file_that_nobody_listed_is_noticed(bundle: Path) -> None:
    (bundle / "engines" / "stranger.plan").write_bytes(b"")

    with pytest.raises(InputError, match=r"stranger\.plan, which its manifest does not list"):
        read_bundle(bundle).verify()


def test_a_file_the_bundle_lacks_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model\.fp16\.onnx; expected one of"):
        read_bundle(bundle).onnx(Precision.FP16)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is not a bundle"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "is not a bundle"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a srdeploy manifest"),
        (edit(lambda document: document.update(kind="onnx")), "does not fit together"),
        (edit(lambda document: document["details"]["files"].update({"x": "0" * 64})), "its file list was edited"),
        (edit(lambda document: document["details"].pop("engines")), "is not a bundle's manifest"),
        (
            edit(lambda document: document["details"]["engines"][0].update(precision="fp1")),
            "is not a bundle's manifest",
        ),
        (
            edit(lambda document: document["details"]["engines"][0].update(file="../e")),
            r"does not fit together: \.\./e",
        ),
        (edit(lambda document: document["details"]["contract"].pop("scale")), "incomplete srdeploy metadata"),
    ],
    ids=["none", "binary", "cut", "other kind", "file added", "no engines", "precision", "outside", "contract"],
)
def test_a_broken_manifest_is_one_line(bundle: Path, change: Callable[[Path], None], words: str) -> None:
    change(bundle)

    with pytest.raises(InputError, match=words) as caught:
        read_bundle(bundle)

    assert "\n" not in str(caught.value)


def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    opened = read_bundle(bundle)
    files = {**opened.files, "../outside": "0" * 64}
    edit(lambda document: document["details"].update(files=files))(bundle)

    with pytest.raises(InputError, match="does not fit together"):
        read_bundle(bundle)


ALL = {"tensorrt-rtx": None, "openvino": None, "onnxruntime": None}


@pytest.mark.parametrize(
    ("obstacles", "wanted", "expected"),
    [
        (ALL, {}, PLAN),
        ({**ALL, "tensorrt-rtx": "no NVIDIA GPU"}, {}, INT8),
        ({**ALL, "tensorrt-rtx": "no NVIDIA GPU", "openvino": "not installed"}, {}, FP32),
        (ALL, {"device": "cpu"}, INT8),
        (ALL, {"device": "cuda:1"}, PLAN),
        (ALL, {"engine": "tensorrt-rtx"}, PLAN),
        (ALL, {"precision": Precision.FP32}, FP32),
        ({"tensorrt-rtx": None, "openvino": "x", "onnxruntime": "y"}, {}, PLAN),
    ],
    ids=[
        "GPU engine",
        "without a GPU",
        "next best",
        "CPU on a GPU machine",
        "second GPU",
        "asked engine",
        "asked precision",
        "unverified when alone",
    ],
)
def test_the_best_engine_that_can_run_is_chosen(
    bundle: Path, obstacles: dict[str, str | None], wanted: dict[str, Any], expected: BundleEngine
) -> None:
    assert choose_engine(read_bundle(bundle), obstacles=obstacles, **wanted) == expected


def test_all_that_can_run_are_listed_best_first(bundle: Path) -> None:
    assert runnable_engines(read_bundle(bundle), obstacles=ALL) == (PLAN, INT8, FP32)
    assert runnable_engines(read_bundle(bundle), obstacles={**ALL, "openvino": "no"}) == (PLAN, FP32)


def test_the_plan_of_the_requested_gpu_comes_first(tmp_path: Path) -> None:
    plans = [
        BundleEngine(f"{index}.plan", "tensorrt", Precision.FP16, True, 70.0, 1.0 + index, 9.0, device=f"cuda:{index}")
        for index in range(2)
    ]
    for plan in plans:
        (tmp_path / plan.file).write_bytes(b"plan")
    source = Source("checkpoint", "net.pt", "00" * 32)
    write_bundle_manifest(tmp_path, contract=CONTRACT, checkpoint=source, engines=plans)
    bundle = read_bundle(tmp_path)

    assert choose_engine(bundle, obstacles={"tensorrt": None}) == plans[0]
    assert choose_engine(bundle, obstacles={"tensorrt": None}, device="cuda:1") == plans[1]


def test_when_none_can_run_each_reason_is_told(bundle: Path) -> None:
    obstacles = {"tensorrt-rtx": "no NVIDIA GPU", "openvino": "not installed", "onnxruntime": "not installed"}

    with pytest.raises(CapabilityError, match=r"tensorrt-rtx \(no NVIDIA GPU\).*srdeploy doctor"):
        choose_engine(read_bundle(bundle), obstacles=obstacles)


def test_an_engine_the_bundle_never_had_lists_those_it_has(bundle: Path) -> None:
    with pytest.raises(CapabilityError, match="expected one of its own: tensorrt-rtx fp16, openvino int8"):
        choose_engine(read_bundle(bundle), engine="tensorrt", obstacles=ALL)


def test_this_machine_is_asked_when_nobody_says(bundle: Path) -> None:
    known = machine_obstacles()

    assert known["onnxruntime"] is None
    assert choose_engine(read_bundle(bundle), engine="onnxruntime") == FP32


def test_the_card_may_be_edited_and_a_signature_and_a_hubs_files_added(bundle: Path) -> None:
    (bundle / "README.md").write_text("# card\n")
    opened = read_bundle(bundle)
    source = Source("checkpoint", "net.pt", "00" * 32)
    write_bundle_manifest(bundle, contract=CONTRACT, checkpoint=source, engines=opened.engines)

    (bundle / "README.md").write_text("# card\nlicense: apache-2.0\n")
    (bundle / "model.sig").write_text("{}")
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs\n")
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "a.lock").touch()

    assert "README.md" in read_bundle(bundle).files
    read_bundle(bundle).verify()


def signed_with(*material: str) -> str:
    return json.dumps({"verificationMaterial": {key: {} for key in material}, "dsseEnvelope": {"payload": "e30="}})


@pytest.mark.parametrize(
    ("material", "method"),
    [("publicKey", "key"), ("x509CertificateChain", "certificate"), ("certificate", "sigstore")],
    ids=["key", "certificate", "identity"],
)
def test_a_signature_is_found_with_the_command_that_verifies_it(bundle: Path, material: str, method: str) -> None:
    assert find_signature(bundle) is None
    (bundle / SIGNATURE).write_text(signed_with("tlogEntries", material))

    found = find_signature(bundle)

    assert found is not None
    assert found.method == method
    assert found.verify_command[:3] == ("model_signing", "verify", method)


@pytest.mark.parametrize("text", ["", "{}", "[]", signed_with("tlogEntries"), "\xff"], ids=range(5))
def test_a_signature_that_is_none_is_one_line(bundle: Path, text: str) -> None:
    (bundle / SIGNATURE).write_text(text, encoding="latin-1")

    with pytest.raises(InputError, match="is not a signature; expected a Sigstore bundle"):
        find_signature(bundle)
