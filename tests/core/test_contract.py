"""The outside contract survives ONNX metadata, and incomplete metadata is refused."""

import dataclasses
import json

import pytest

from srdeploy.core.contract import PREFIX, ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.precision import MIN_FIDELITY_DB, Precision

CONTRACT = ModelContract(
    architecture="srdensenet",
    configuration={"growth": 16, "variant": "all"},
    scale=4,
    colours="y",
    precision=Precision.INT8,
    receptive_radius=66,
    macs_per_pixel=1234.5,
    largest_tensor_per_pixel=4096,
    checkpoint_sha256="ab" * 32,
    trim=1,
    provenance={"opset": 20, "evidence": [{"name": "value_range", "why": "metadata"}]},
)


def test_metadata_reads_back_beside_foreign_entries() -> None:
    metadata = CONTRACT.to_metadata()

    assert all(name.startswith(PREFIX) and isinstance(value, str) for name, value in metadata.items())
    assert ModelContract.from_metadata({**metadata, "producer": "x"}, name="m") == CONTRACT
    assert json.loads(metadata["srdeploy.value_range"]) == [0, 1]


def test_a_global_receptive_field_reads_back_as_none() -> None:
    contract = dataclasses.replace(CONTRACT, receptive_radius=None)

    assert ModelContract.from_metadata(contract.to_metadata(), name="m").receptive_radius is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"srdeploy.schema": None}, "carries no srdeploy metadata.*srdeploy export"),
        ({"srdeploy.schema": "2"}, "schema 2; expected schema 1"),
        ({"srdeploy.scale": None}, "incomplete"),
        ({"srdeploy.scale": "{"}, "incomplete"),
        ({"srdeploy.precision": '"fp12"'}, "incomplete"),
    ],
    ids=["foreign", "newer", "missing field", "broken json", "unknown precision"],
)
def test_other_metadata_is_refused_with_the_file_named(change: dict[str, str | None], words: str) -> None:
    metadata = {name: value for name, value in {**CONTRACT.to_metadata(), **change}.items() if value is not None}

    with pytest.raises(InputError, match=words) as caught:
        ModelContract.from_metadata(metadata, name="odd.onnx")

    assert "odd.onnx" in str(caught.value)


def test_output_shape_follows_scale_and_trim() -> None:
    assert CONTRACT.output_shape((2, 1, 10, 20)) == (2, 1, 39, 79)
    assert dataclasses.replace(CONTRACT, trim=0).output_shape((1, 1, 1, 1)) == (1, 1, 4, 4)


def test_channels_follow_the_colours() -> None:
    assert CONTRACT.channels == 1
    assert dataclasses.replace(CONTRACT, colours="rgb").channels == 3


def test_every_precision_has_a_fidelity_gate_and_lower_types_a_lower_one() -> None:
    assert set(MIN_FIDELITY_DB) == set(Precision)
    order = [MIN_FIDELITY_DB[p] for p in (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)]
    assert order == sorted(order, reverse=True)
