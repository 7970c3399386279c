"""Containers beside torch.save: NumPy archives and pickles, exported programs, distributed checkpoints."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_fuzzing.networks import assert_network, save_distributed, tree
from checkpoint_fuzzing.seeds import official_rcan, random_state, torch_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.load import examine_checkpoint, load_checkpoint
from srdeploy.models.checkpoint.reader import read_checkpoint

STATE = random_state(official_rcan())
ARRAYS = {name: value.numpy() for name, value in STATE.items()}

# ----------------------------------------------------------------------------------------------------------------------
# NumPy


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_arrays_is_read(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "net.npz", **ARRAYS)

    examined = examine_checkpoint(tmp_path / "net.npz", strict=True)

    assert examined.raw.container == "NumPy archive"
    assert_network(load_checkpoint(tmp_path / "net.npz"), STATE)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "bool"])
def test_arrays_keep_their_type_and_order(tmp_path: Path, dtype: str) -> None:
    array = np.asfortranarray(np.arange(24).reshape(2, 3, 4).astype(dtype))
    np.savez(tmp_path / "net.npz", a=array, b=array[:, ::2], scalar=np.float32(3))

    found = read_checkpoint(tmp_path / "net.npz").tensors

    assert str(found["a"].dtype) == f"torch.{dtype}"
    assert np.array_equal(found["a"].numpy(), array)
    assert np.array_equal(found["b"].numpy(), array[:, ::2])
    assert found["scalar"].shape == ()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_arrays_in_a_state_dict_are_read_and_said_aloud(tmp_path: Path, protocol: int, legacy: bool) -> None:
    arrays = {**ARRAYS, "head.0.weight": np.asfortranarray(ARRAYS["head.0.weight"])}
    torch.save(arrays, tmp_path / "net.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)

    loaded = load_checkpoint(tmp_path / "net.pth")

    assert_network(loaded, STATE)
    assert f"{len(STATE)} tensors are stored as NumPy arrays" in loaded.evidence.notes


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_arrays_alone_is_read(tmp_path: Path, protocol: int) -> None:
    if protocol < 2:
        pytest.skip("NumPy writes no array in protocols 0 and 1 that is read as text")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "us"}, protocol))

    examined = examine_checkpoint(tmp_path / "net.pkl", strict=True)

    assert examined.raw.container == "pickle"
    assert_network(load_checkpoint(tmp_path / "net.pkl"), STATE)


def _npz(header: bytes, data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", "whose shape needs another number"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "whose shape needs another number"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", "tensor a of kind object"),
        (b"{'descr': '>f4', 'fortran_order': False, 'shape': (2,)}", "tensor a of kind big-endian float32"),
        (b"{'descr': '<f4'}", "without a valid header"),
        (b"__import__('os').system('true')", "without a valid header"),
        (b"(" * 5000, "without a valid header"),
    ],
    ids=["huge", "negative", "objects", "big-endian", "incomplete", "code", "nested"],
)
def test_hostile_arrays_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "net.npz").write_bytes(_npz(header, bytes(8)))

    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "net.npz")


# ----------------------------------------------------------------------------------------------------------------------
# Exported programs


class Chain(nn.Module):
    """A network whose names are an RCAN's, with a forward that torch.export takes."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in tree(official_rcan()).named_children():
            self.add_module(name, child)
        self.load_state_dict(STATE)

    def forward(self, image: Tensor) -> Tensor:
        maps: Tensor = self.head.get_submodule("0")(image)
        return maps


def test_the_weights_of_an_exported_program_are_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Chain(), (torch.zeros(1, 3, 8, 8),)), tmp_path / "net.pt2")

    examined = examine_checkpoint(tmp_path / "net.pt2", strict=True)

    assert examined.raw.container == "torch.export program"
    assert_network(load_checkpoint(tmp_path / "net.pt2"), STATE)


def test_programs_of_earlier_versions_hold_a_torch_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", torch_file(STATE, legacy=False))
        archive.writestr("version", "8.1")

    assert_network(load_checkpoint(tmp_path / "net.pt2"), STATE)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b'{"config": 3}', b'{"config": {"a": {}}}', b"[" * 100_000],
    ids=lambda text: text[:12].decode(),
)
def test_a_damaged_description_of_weights_is_refused(tmp_path: Path, text: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("a/data/weights/model_weights_config.json", text)

    with pytest.raises(InputError, match="description of its weights|holds no network"):
        read_checkpoint(tmp_path / "net.pt2")


# ----------------------------------------------------------------------------------------------------------------------
# Distributed checkpoints


@pytest.mark.parametrize(
    "document",
    [
        {"model": STATE},
        STATE,
        {"state_dict": {f"module.{name}": value for name, value in STATE.items()}, "epoch": 3, "lr": torch.ones(1)},
    ],
    ids=["wrapped", "bare", "beside other values"],
)
def test_a_distributed_checkpoint_is_read(tmp_path: Path, document: dict[str, Any]) -> None:
    folder = save_distributed(tmp_path / "dcp", document)

    examined = examine_checkpoint(folder, strict=True)

    assert examined.raw.container == "distributed checkpoint"
    assert len(examined.raw.sha256) == 64
    assert_network(load_checkpoint(folder), STATE)


def _sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write every weight as two chunks, in two files, by PyTorch's own metadata."""
    folder.mkdir()
    tensors, places = {}, {}
    files = [io.BytesIO(), io.BytesIO()]
    for name, value in state.items():
        half = max(value.shape[0] // 2, 1)
        chunks = []
        for index, (start, part) in enumerate(((0, value[:half]), (half, value[half:]))):
            if part.numel() == 0:
                continue
            offsets = torch.Size([start, *[0] * (value.ndim - 1)])
            data = io.BytesIO()
            torch.save(part.clone(), data)
            info = _StorageInfo(f"__{index}_0.distcp", files[index].tell(), len(data.getvalue()))
            files[index].write(data.getvalue())
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            places[MetadataIndex(name, offsets, index)] = info
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, chunks)
    for index, file in enumerate(files):
        (folder / f"__{index}_0.distcp").write_bytes(file.getvalue())
    metadata = Metadata(tensors, {name: (name,) for name in state}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_shards_are_assembled_as_pytorch_does(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "dcp", STATE)
    expected = {name: torch.zeros_like(value) for name, value in STATE.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(expected, checkpoint_id=folder)

    loaded = load_checkpoint(folder)

    assert_network(loaded, expected)
    assert_network(loaded, STATE)


def test_a_missing_chunk_is_refused(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "dcp", STATE)
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written above
    lost = next(key for key in metadata.storage_data if key.fqn == "head.0.weight")
    del metadata.storage_data[lost]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    with pytest.raises(InputError, match=r"lacks a part of tensor head.0.weight"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}.", b"\x80\x02K\x01.", pickle.dumps([1])])
def test_damaged_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = save_distributed(tmp_path / "dcp", {"model": STATE})
    (folder / ".metadata").write_bytes(content)

    with pytest.raises(InputError, match=r"\.metadata|is truncated or damaged|is empty"):
        read_checkpoint(folder)
