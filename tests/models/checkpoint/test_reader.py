"""Every container, wrapper and era of checkpoint is read to the same tensors, and what was done is recorded."""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoint_fuzzing.pickles import (
    Call,
    Name,
    New,
    Persistent,
    Python2Text,
    Values,
    contiguous,
    legacy_file,
    tensor,
    zip_file,
)
from checkpoint_fuzzing.seeds import module_file, random_state, torch_file, wxywhu_srdensenet
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.reader import RawCheckpoint, read_checkpoint

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "gate.weight": (2, 4, 1, 1), "slope": (1,), "scalar": ()}
STATE = random_state(SHAPES)
OTHER = {name: value + 1 for name, value in STATE.items()}
ORDERED = Call(Name("collections", "OrderedDict"), ())


def read(folder: Path, data: bytes, name: str = "checkpoint.pth") -> RawCheckpoint:
    path = folder / name
    path.write_bytes(data)
    return read_checkpoint(path)


def refusal(folder: Path, data: bytes, name: str = "checkpoint.pth") -> str:
    with pytest.raises(InputError) as caught:
        read(folder, data, name)
    message = str(caught.value)
    assert str(folder / name) in message
    assert message.isprintable()
    return message


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


# ----------------------------------------------------------------------------------------------------------------------
# Containers


@pytest.mark.parametrize(
    ("container", "data"),
    [
        ("torch zip", torch_file(STATE, legacy=False)),
        ("torch legacy stream", torch_file(STATE, legacy=True)),
        ("safetensors", save_safetensors(STATE)),
    ],
    ids=["zip", "legacy", "safetensors"],
)
def test_containers_give_the_same_tensors(tmp_path: Path, container: str, data: bytes) -> None:
    found = read(tmp_path, data)

    assert_same(dict(sorted(found.tensors.items())), dict(sorted(STATE.items())))
    assert found.container == container
    assert found.wrapper_path == ()
    assert found.size_bytes == len(data)
    assert list(found.alternatives) == ["raw"]


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    data = torch_file(STATE, legacy=False)

    assert read(tmp_path, data).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int, legacy: bool) -> None:
    stream = io.BytesIO()
    torch.save(
        OrderedDict(STATE), stream, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
    )  # an OrderedDict, as state_dict() returns

    assert_same(read(tmp_path, stream.getvalue()).tensors, STATE)


def test_names_that_safetensors_omitted_as_copies_are_read(tmp_path: Path) -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.PReLU(), "b": torch.nn.Conv2d(1, 1, 1)})
    network["c"] = network["a"]
    save_model(network, str(tmp_path / "net.safetensors"))

    found = read_checkpoint(tmp_path / "net.safetensors")

    assert sorted(found.tensors) == sorted(network.state_dict())
    assert found.metadata == {}


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors_of_one_process_are_whole(tmp_path: Path, process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    torch.save({name: distribute_tensor(value, mesh, [Replicate()]) for name, value in STATE.items()}, tmp_path / "a")

    assert_same(read_checkpoint(tmp_path / "a").tensors, STATE)


def test_one_shard_of_a_distributed_tensor_is_refused(tmp_path: Path) -> None:
    part = tensor(Values("0", (1.0, 2.0)).identifier(legacy=False), (2,))
    whole = (Name("torch.distributed.tensor", "DTensor"), Name("torch", "float32"), (4,), (1,), 0)
    shard = Call(
        Name("torch._tensor", "_rebuild_from_type_v2"),
        (Name("torch._utils", "_rebuild_wrapper_subclass"), whole[0], whole, (None, {"_local_tensor": part})),
    )

    message = refusal(tmp_path, zip_file({"a": shard}, (Values("0", (1.0, 2.0)),)))

    assert "tensor a of kind shard of a DTensor" in message
    assert "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))" in message


def test_the_file_name_decides_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, save_safetensors(STATE), "weights.pt")

    assert found.container == "safetensors"


def test_a_repacked_compressed_zip_is_read(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_file(STATE, legacy=False))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))

    assert_same(read(tmp_path, packed.getvalue()).tensors, STATE)


def test_views_shared_storages_and_strides_are_kept(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "whole": base,
        "part": base[4:10],
        "turned": base.reshape(4, 6).t(),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }

    for legacy in (True, False):
        found = read(tmp_path, torch_file(state, legacy=legacy)).tensors
        assert_same(found, state)
        assert found["turned"].stride() == (1, 6)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
    ids=str,
)
def test_dtypes_are_kept_and_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"weight": torch.arange(6).reshape(2, 3).to(dtype)}

    for data in (torch_file(state, legacy=True), torch_file(state, legacy=False), save_safetensors(state)):
        found = read(tmp_path, data)
        assert_same(found.tensors, state)
        assert found.dtypes == {str(dtype).removeprefix("torch."): 1}


def test_booleans_are_read(tmp_path: Path) -> None:
    state = {"mask": torch.tensor([True, False, True])}

    assert_same(read(tmp_path, torch_file(state, legacy=True)).tensors, state)


def test_a_complex_tensor_is_refused_by_its_kind(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2, dtype=torch.complex64)}

    assert "tensor weight of kind complex64" in refusal(tmp_path, torch_file(state, legacy=False))


def test_tensors_can_outlive_and_outlast_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, torch_file(STATE, legacy=False))

    (tmp_path / "checkpoint.pth").write_bytes(b"")

    assert_same(found.tensors, STATE)


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"state_dict": STATE, "epoch": 3}, ("state_dict",)),
        ({"params": STATE}, ("params",)),
        ({"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ("model",)),
        ({"model_g": STATE, "model_d": OTHER, "optim_g": {}}, ("model_g",)),
        ({"net": STATE}, ("net",)),
        ({"metadata": {"scale": 2}, "params": STATE}, ("params",)),
        ({"model": {"state_dict": STATE}}, ("model", "state_dict")),
        ({"state_dict": (STATE, 3)}, ("state_dict", "[0]")),
        ([STATE], ("[0]",)),
        ({"my_own_name": STATE, "optimizer": {"state": {"a": torch.ones(2)}}}, ("my_own_name",)),
        ({"state_dict": STATE, "model": STATE}, ("state_dict",)),
    ],
    ids=[
        "state_dict",
        "params",
        "model",
        "generator beside discriminator",
        "net",
        "metadata",
        "two deep",
        "tuple",
        "list",
        "unknown name",
        "the same under two names",
    ],
)
def test_wrappers_are_opened_and_recorded(tmp_path: Path, document: Any, path: tuple[str, ...]) -> None:
    for legacy in (True, False):
        found = read(tmp_path, torch_file(document, legacy=legacy))
        assert_same(found.tensors, STATE)
        assert found.wrapper_path == path


@pytest.mark.parametrize(
    ("document", "paths"),
    [
        ({"params": STATE, "params_ema": OTHER}, {"raw": ("params",), "ema": ("params_ema",)}),
        (
            {"state_dict": STATE, "ema_state_dict": {f"module.{n}": v for n, v in OTHER.items()}},
            {"raw": ("state_dict",), "ema": ("ema_state_dict",)},
        ),
        ({"params_ema": OTHER}, {"ema": ("params_ema",)}),
        (
            {"model": {"params": STATE, "params_ema": OTHER}},
            {"raw": ("model", "params"), "ema": ("model", "params_ema")},
        ),
    ],
    ids=["BasicSR", "averaged model", "average alone", "inside another wrapper"],
)
def test_raw_and_ema_weights_are_both_there(tmp_path: Path, document: Any, paths: dict[str, tuple[str, ...]]) -> None:
    found = read(tmp_path, torch_file(document, legacy=False))

    assert {weights: state.path for weights, state in found.alternatives.items()} == paths
    assert found.weights == next(iter(paths))
    for weights, state in found.alternatives.items():
        assert_same(state.tensors, STATE if weights == "raw" else OTHER)


def test_the_counter_of_an_averaged_model_is_ignored(tmp_path: Path) -> None:
    averaged = {"n_averaged": torch.tensor(9), **{f"module.{name}": value for name, value in STATE.items()}}

    found = read(tmp_path, torch_file({"ema_state_dict": averaged}, legacy=False))

    assert_same(found.tensors, STATE)
    assert found.alternatives["ema"].ignored == ("n_averaged",)
    assert found.alternatives["ema"].prefix == "module."


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "net_g."])
def test_a_prefix_on_every_name_is_stripped(tmp_path: Path, prefix: str) -> None:
    found = read(tmp_path, torch_file({prefix + name: value for name, value in STATE.items()}, legacy=False))

    assert_same(found.tensors, STATE)
    assert found.alternatives["raw"].prefix == prefix


def test_a_prefix_on_some_names_stays(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "bias": torch.ones(2)}

    assert_same(read(tmp_path, torch_file(state, legacy=False)).tensors, state)


def test_two_different_networks_are_both_there(tmp_path: Path) -> None:
    found = read(tmp_path, torch_file({"state_dict": STATE, "model": OTHER}, legacy=False))

    assert list(found.alternatives) == ["state_dict", "model"]


def test_what_the_wrapper_says_is_kept_as_hints(tmp_path: Path) -> None:
    document = {"epoch": 7, "best_psnr": float("nan"), "note": "a\x1b[2Jb", "state_dict": STATE, "optimizer": {}}

    hints = read(tmp_path, torch_file(document, legacy=False)).hints

    assert hints.keys == ("epoch", "best_psnr", "note", "state_dict", "optimizer")
    assert hints.values["epoch"] == 7
    json.dumps(hints.values, allow_nan=False)
    assert "\x1b" not in hints.values["note"]


def test_numpy_numbers_beside_the_weights_become_numbers(tmp_path: Path) -> None:
    document = {"best_psnr": numpy.float64(31.25), "epoch": numpy.int64(4), "state_dict": STATE}

    for legacy in (True, False):
        assert read(tmp_path, torch_file(document, legacy=legacy)).hints.values == {"best_psnr": 31.25, "epoch": 4}


def test_constructor_arguments_come_as_metadata(tmp_path: Path) -> None:
    arguments = {"scale": 2, "act_mode": "silu", "norm": False}
    in_header = save_safetensors(STATE, metadata={"metadata": json.dumps(arguments)})
    beside = torch_file({"metadata": arguments, "params": STATE}, legacy=False)

    assert read(tmp_path, in_header).metadata == arguments
    assert read(tmp_path, beside).metadata == arguments


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "an empty dict"),
        ({"state_dict": {}}, "the keys state_dict"),
        ({"epoch": 3, "optimizer": {"state": {"a": torch.ones(1)}}}, "the keys epoch, optimizer"),
        (torch.ones(3), "a value of type TensorRecord"),
        ([], "a value of type list"),
        (3, "a value of type int"),
    ],
    ids=["empty", "empty inside", "optimizer alone", "one tensor", "empty list", "number"],
)
def test_a_file_without_a_network_says_what_it_holds(tmp_path: Path, document: Any, message: str) -> None:
    assert "holds no network" in refusal(tmp_path, torch_file(document, legacy=False))
    assert message in refusal(tmp_path, torch_file(document, legacy=True))


# ----------------------------------------------------------------------------------------------------------------------
# Pickled networks


@pytest.mark.parametrize("parallel", [False, True], ids=["alone", "DataParallel"])
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_a_pickled_network_is_lifted_without_its_classes(tmp_path: Path, legacy: bool, parallel: bool) -> None:
    shapes = wxywhu_srdensenet()

    found = read(
        tmp_path,
        module_file(shapes, Name("SR_DenseNet", "Net"), legacy=legacy, parallel=parallel, device="cuda:0"),
    )

    assert {name: tuple(value.shape) for name, value in found.tensors.items()} == shapes
    assert all(value.device.type == "cpu" for value in found.tensors.values())
    assert found.wrapper_path == ("model",)
    assert found.modules[""].kind == "SR_DenseNet.Net"
    assert found.modules["dense1.0.conv"].kind == "torch.nn.modules.conv.Conv2d"
    assert found.modules["conv1"].attributes["kernel_size"] == [3, 3]
    assert found.alternatives["raw"].prefix == ("module." if parallel else "")


def test_a_real_pickled_module_gives_its_state_dict(tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        OrderedDict(a=torch.nn.Conv2d(1, 2, 3), b=torch.nn.BatchNorm2d(2), c=torch.nn.PReLU())
    )
    network.register_buffer("passing", torch.ones(1), persistent=False)

    for legacy in (True, False):
        found = read(tmp_path, torch_file(network, legacy=legacy))
        assert_same(dict(sorted(found.tensors.items())), dict(sorted(network.state_dict().items())))
        assert found.modules["a"].attributes["in_channels"] == 1


def test_a_shared_module_comes_under_each_of_its_names(tmp_path: Path) -> None:
    slope = torch.nn.PReLU()
    network = torch.nn.Sequential(slope, torch.nn.Conv2d(1, 1, 1), slope)

    found = read(tmp_path, torch_file(network, legacy=False))

    assert sorted(found.tensors) == sorted(network.state_dict())


def _storage() -> Values:
    return Values("94443105817744", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "cuda:0")


def _old_tensor(rebuild: str = "_rebuild_tensor") -> Call:
    return Call(Name("torch._utils", rebuild), (_storage().identifier(legacy=True), 0, (2, 3), (3, 1)))


@pytest.mark.parametrize(
    "parameter",
    [
        Call(Name("torch.nn.parameter", "Parameter"), (_old_tensor(),), (True, False, None)),
        Call(Name("torch.autograd.variable", "Variable"), (_old_tensor(),), (True, False, None)),
        New(Name("torch.nn.parameter", "Parameter"), (_old_tensor(),), (True, False, None)),
        New(Name("torch.nn.parameter", "Parameter"), (), (_old_tensor(), None, None, True, False)),
        Call(Name("torch._utils", "_rebuild_parameter"), (_old_tensor(), True, ORDERED)),
        Call(Name("torch._utils", "_rebuild_parameter_with_state"), (_old_tensor(), True, ORDERED, {})),
    ],
    ids=["0.3 parameter", "0.3 variable", "0.3 new", "0.1 state", "0.4 and later", "with state"],
)
def test_parameters_of_every_era_are_their_data(tmp_path: Path, parameter: Any) -> None:
    """Streams of PyTorch 0.1 to 0.4, written by Python 2: byte strings, `copy_reg`, dicts made from pairs."""
    source = Persistent((Python2Text(b"module"), Name("srdensenet", "Net"), "net.py", Python2Text(b"# caf\xe9")))
    pairs = Call(Name("collections", "OrderedDict"), ([[Python2Text(b"weight"), parameter]],))
    state = {
        Python2Text(b"_parameters"): pairs,
        Python2Text(b"_buffers"): ORDERED,
        Python2Text(b"_modules"): ORDERED,
        Python2Text(b"note"): Python2Text(b"caf\xe9"),
        Python2Text(b"_backend"): Call(Name("torch.nn.backends.thnn", "_get_thnn_function_backend"), ()),
        Python2Text(b"names"): Call(Name("__builtin__", "set"), ([],)),
    }
    network = Call(Name("copy_reg", "_reconstructor"), (source, Name("__builtin__", "object"), None), state)

    found = read(tmp_path, legacy_file({Python2Text(b"model"): network}, (_storage(),)))

    assert_same(found.tensors, {"weight": torch.arange(1.0, 7.0).reshape(2, 3)})
    assert found.modules[""].kind == "srdensenet.Net"
    assert found.modules[""].attributes == {"note": "café", "names": []}


@pytest.mark.parametrize("kind", ["torch.FloatStorage", "torch.cuda.FloatStorage"])
def test_storages_of_either_device_are_read(tmp_path: Path, kind: str) -> None:
    module, _, name = kind.rpartition(".")
    storage = Persistent(("storage", Name(module, name), "0", "cuda:0", 6, None))

    found = read(tmp_path, legacy_file({"a": tensor(storage, (6,))}, (Values("0", (1, 2, 3, 4, 5, 6)),)))

    assert found.tensors["a"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_view_of_a_storage_is_read(tmp_path: Path) -> None:
    storage = Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, ("view", 2, 3)))

    found = read(tmp_path, legacy_file({"a": tensor(storage, (2,), offset=1)}, (Values("0", (1, 2, 3, 4, 5, 6)),)))

    assert found.tensors["a"].tolist() == [4, 5]


def test_a_tensor_over_raw_bytes_is_read(tmp_path: Path) -> None:
    storage = Persistent(("storage", Name("torch.storage", "UntypedStorage"), "0", "cpu", 24))
    raw = Call(
        Name("torch._utils", "_rebuild_tensor_v3"),
        (storage, 2, (4,), (1,), False, ORDERED, Name("torch", "float32")),
    )

    found = read(tmp_path, zip_file({"a": raw}, (Values("0", (1, 2, 3, 4, 5, 6)),)))

    assert found.tensors["a"].tolist() == [3, 4, 5, 6]


def test_a_tensor_of_a_subclass_is_its_tensor(tmp_path: Path) -> None:
    plain = tensor(Values("0", (1.0, 2.0)).identifier(legacy=False), (2,))
    wrapped = Call(
        Name("torch._tensor", "_rebuild_from_type_v2"),
        (plain.function, Name("torch.nn.parameter", "Buffer"), plain.arguments, {}),
    )

    found = read(tmp_path, zip_file({"a": wrapped}, (Values("0", (1.0, 2.0)),)))

    assert found.tensors["a"].tolist() == [1.0, 2.0]


def test_arguments_and_objects_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    weight = tensor(Values("0", (1.0,)).identifier(legacy=False), (1,))
    document = {
        "state_dict": {"a": weight},
        "args": New(Name("argparse", "Namespace"), (), {"lr": 0.1, "device": Call(Name("torch", "device"), ("cuda",))}),
        "started": Call(Name("datetime", "datetime"), (b"\x07\xe0\x01\x01\x00\x00\x00\x00\x00\x00",)),
        "folder": Call(Name("pathlib", "PosixPath"), ("/", "home")),
        "config": New(Name("easydict", "EasyDict"), (), {"x": 1}),
    }

    assert list(read(tmp_path, zip_file(document, (Values("0", (1.0,)),))).tensors) == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are no checkpoint


def _zip_of(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def _tar_of(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "only zeros"),
        (b"hello", "is not a checkpoint"),
        (b"Lorem ipsum", "is not a checkpoint"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a PNG image"),
        (b"\x1f\x8b\x08" + bytes(50), "is a gzip file"),
        (_tar_of("model.pth"), "is a tar archive"),
        (_zip_of(model__pth=b"x"), "pass the file model.pth inside"),
        (_zip_of(notes__txt=b"x"), "not one that torch.save wrote"),
        (_zip_of(**{"net/constants.pkl": b"", "net/data.pkl": b""}), "TorchScript"),
        (b"\x80\x04K\x01.", "a pickle that torch.save did not write"),
        (b"\x80", "not enough data in stream"),
    ],
    ids=[
        "empty",
        "zeros",
        "text",
        "text that begins like a pickle",
        "web page",
        "LFS pointer",
        "image",
        "gzip",
        "tar",
        "zip of a checkpoint",
        "zip of something",
        "TorchScript",
        "other pickle",
        "one byte",
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refusal(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [torch_file(STATE, legacy=False), torch_file(STATE, legacy=True), save_safetensors(STATE)],
    ids=["zip", "legacy", "safetensors"],
)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, data: bytes) -> None:
    for length in {*range(1, len(data), max(len(data) // 97, 1)), len(data) - 1}:
        refusal(tmp_path, data[:length])


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path, message in [
        (tmp_path / "missing.pth", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ]:
        with pytest.raises(InputError, match=message):
            read_checkpoint(path)


def test_a_big_endian_archive_is_refused(tmp_path: Path) -> None:
    data = torch_file(STATE, legacy=False).replace(b"little", b"biggg!")

    assert "big-endian" in refusal(tmp_path, data)


def test_contiguous_strides() -> None:
    assert contiguous((4, 3, 2)) == torch.empty(4, 3, 2).stride()
