"""Checkpoints written by the public training codes load, and compute what the original classes compute."""

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.load import Choices, LoadedCheckpoint, load_checkpoint

CASES = sorted((Path(__file__).parents[2] / "data" / "checkpoints").glob("*/case.json"))
ROW_STEP = 3


def largest_error(loaded: LoadedCheckpoint, image: Any, expected: Any, native: float, dtype: torch.dtype) -> float:
    """Return the largest absolute difference on the source's own range."""
    network = loaded.reference.to(dtype)
    with torch.inference_mode():
        output = network(torch.from_numpy(image).to(dtype) / native) * native
    return float(np.abs(output.numpy() - expected).max())


def case_and_id() -> list[Any]:
    return [pytest.param(path, id=path.parent.name) for path in CASES]


@pytest.mark.parametrize("path", case_and_id())
def test_committed_checkpoints_compute_what_their_code_computes(path: Path) -> None:
    case = json.loads(path.read_text())
    checkpoint = path.with_name(case["file"])
    if "refused" in case:
        with pytest.raises(InputError, match=case["refused"]):
            load_checkpoint(checkpoint)
        return
    arrays = np.load(path.with_name("io.npz"))

    for weights, name in ((None, "output"), ("ema", "output_ema")):
        if name not in arrays:
            continue
        loaded = load_checkpoint(checkpoint, Choices(**case["choices"], weights=weights))
        for dtype, tolerance in ((torch.float64, "f64_max_abs"), (torch.float32, "f32_max_abs")):
            with torch.inference_mode():
                image = torch.from_numpy(arrays["input"]).to(dtype) / case["native_range"]
                output = loaded.reference.to(dtype)(image) * case["native_range"]
            error = np.abs(output.numpy()[:, :, ::ROW_STEP] - arrays[name]).max()

            assert loaded.dialect == case["dialect"]
            assert error <= case[tolerance], f"{name} in {dtype}"


def test_raw_and_averaged_weights_are_different_networks() -> None:
    path = next(path for path in CASES if path.parent.name == "basicsr_rcan_x4_ema")
    arrays = np.load(path.with_name("io.npz"))

    assert np.abs(arrays["output"] - arrays["output_ema"]).max() > 0.01


def test_all_reference_checkpoints(reference_data: Path) -> None:
    """The whole list, with the inputs of both batches and the float32 outputs."""
    root = reference_data / "fixtures" / "checkpoints"
    with (root / "INDEX.tsv").open() as stream:
        names = [row["fixture"] for row in csv.DictReader(stream, delimiter="\t")]
    failures = []
    for name in names:
        config = json.loads((root / name / "config.json").read_text())
        if name.startswith("full_") or config["expected"].startswith("refuse"):
            continue
        failures += _failures(root / name, config)

    assert len(names) >= 30
    assert not failures


def _failures(folder: Path, config: dict[str, Any]) -> list[str]:
    stated: dict[str, Any] = {}
    if folder.name.startswith("rcanit"):
        stated = {"activation": config["hyper"]["act"], "res_scale": config["hyper"]["res_scale"]}
    elif folder.name.startswith("rdst"):
        stated = {"activation": config["hyper"]["act"]}
    arrays = np.load(folder / "io.npz")
    native = config["input"]["range"][1]
    failures = []
    for weights, middle in ((None, ""), ("ema", "ema_"), ("ema", "params_ema_")):
        if f"output_a_{middle}f64" not in arrays:
            continue
        loaded = load_checkpoint(folder / config["checkpoint"]["file"], Choices(**stated, weights=weights))
        for batch in "ab":
            for dtype, suffix in ((torch.float64, "f64"), (torch.float32, "f32")):
                error = largest_error(
                    loaded, arrays[f"input_{batch}"], arrays[f"output_{batch}_{middle}{suffix}"], native, dtype
                )
                if error > config["tolerance"][f"{suffix}_max_abs"]:
                    failures.append(f"{folder.name} {middle}{batch} {suffix}: {error:g}")
    return failures


FULL_SIZE = [
    pytest.param("full_yulunzhang_rcan_x4", None, "official-rcan", id="official-rcan"),
    pytest.param("full_basicsr_rcan_x2", "params", "basicsr-rcan", id="basicsr-rcan"),
    pytest.param("full_yjn870_srdensenet_x4", None, "yjn870-srdensenet", id="yjn870-srdensenet"),
    pytest.param("full_wxywhu_srdensenet_x4_v1", "model", "wxywhu-srdensenet-v1", id="wxywhu-srdensenet-v1"),
    pytest.param("full_lornatang_srdensenet_x4", "state_dict", "lornatang-srdensenet", id="lornatang-srdensenet"),
]


@pytest.mark.parametrize(("name", "wrapper", "dialect"), FULL_SIZE)
def test_default_size_networks(
    reference_data: Path, tmp_path: Path, name: str, wrapper: str | None, dialect: str
) -> None:
    folder = reference_data / "fixtures" / "checkpoints" / name
    config = json.loads((folder / "config.json").read_text())
    recipe = config["recipe"]
    state = {entry["key"]: recipe_tensor(entry, recipe["seed"]) for entry in recipe["tensors"]}
    path = tmp_path / "full.pth"
    torch.save({"epoch": 1, wrapper: state} if wrapper else state, path, _use_new_zipfile_serialization=bool(wrapper))
    arrays = np.load(folder / "io.npz")

    loaded = load_checkpoint(path)
    native = config["input"]["range"][1]
    error = largest_error(loaded, arrays["input_a"], arrays["output_a_f64"], native, torch.float64)

    assert loaded.dialect == dialect
    assert error <= config["tolerance"]["f64_max_abs"]


def recipe_tensor(entry: dict[str, Any], seed: int) -> torch.Tensor:
    """Return one tensor of a full-size recipe: values seeded by the CRC of the key."""
    generator = np.random.RandomState((zlib.crc32(entry["key"].encode()) ^ seed) & 0xFFFFFFFF)
    shape = entry["shape"]
    if entry["dist"] == "values":
        values = np.array(entry["values"]).reshape(shape)
    else:
        draw = generator.standard_normal(shape) if entry["dist"] == "normal" else generator.uniform(0, 1, shape)
        values = draw * entry["scale"] + entry.get("offset", 0.0)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
