"""Every next step that a message about a checkpoint prints is taken once here, and leads to a network."""

import ast
import gzip
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_fuzzing.networks import assert_network, save_distributed, tree
from checkpoint_fuzzing.pickles import Call, Name, pickled
from checkpoint_fuzzing.seeds import official_rcan, random_state, torch_file
from PIL import Image
from safetensors.torch import save as save_safetensors
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from srdeploy.core.errors import InputError, UsageError
from srdeploy.models.checkpoint.causes import _CAUSES
from srdeploy.models.checkpoint.containers import _OTHER_FILES
from srdeploy.models.checkpoint.filebytes import RefusedError, open_file_bytes
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.models.choices import Choices

ROOT = Path(__file__).parents[3]
STATE = random_state(official_rcan())
GOOD = torch_file(STATE, legacy=False)
OTHER = {name: value + 0.01 for name, value in STATE.items()}

Step = Callable[[Path, str], tuple[Path, Choices]]
"""Takes the refused file and the step's text; returns what to load instead, and how."""


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _good(path: Path, step: str) -> tuple[Path, Choices]:
    """Do what the step says by hand: the file that its tool or its author would give."""
    return _written(path.with_name("good.pth"), GOOD), Choices()


def _safetensors(path: Path, step: str) -> tuple[Path, Choices]:
    return _written(path.with_name("good.safetensors"), save_safetensors(STATE)), Choices()


def _command(path: Path, step: str) -> tuple[Path, Choices]:
    """Run the printed command with the path in place of FILE or FOLDER."""
    matched = re.search(r"python (-c '.*') (?:FILE|FOLDER) (\S+)", step)
    assert matched is not None
    command = f"{sys.executable} {matched[1]} {path} {matched[2]}"
    subprocess.run(command, shell=True, check=True, cwd=path.parent)
    return path.parent / matched[2], Choices()


def _shards(path: Path) -> Path:
    """Return a folder as Hugging Face's libraries write it: parts, and an index of which tensor is where."""
    path.mkdir()
    names = list(STATE)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for part, inside in parts.items():
        (path / part).write_bytes(save_safetensors({name: STATE[name] for name in inside}))
    index = {"metadata": {}, "weight_map": {name: part for part, inside in parts.items() for name in inside}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _passed(path: Path, step: str) -> tuple[Path, Choices]:
    """Pass the path that the step names."""
    return Path(re.search(r"pass (?:the file|its folder) (\S+)", step)[1]), Choices()  # type: ignore[index]


def _extracted(path: Path, step: str) -> tuple[Path, Choices]:
    shutil.unpack_archive(path, path.parent / "inside", "tar" if tarfile.is_tarfile(path) else "zip")
    return next((path.parent / "inside").iterdir()), Choices()


def _unzipped(path: Path, step: str) -> tuple[Path, Choices]:
    return _written(path.with_name("unpacked.pth"), gzip.decompress(path.read_bytes())), Choices()


def _stored(path: Path, step: str) -> tuple[Path, Choices]:
    """Unpack and pack again without compression, folders as entries of their own, as `zip -0 -r` does."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(path.with_name("stored.pth"), "w") as target:
        target.writestr("archive/", b"")
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return path.with_name("stored.pth"), Choices()


def _weights(label: str) -> Step:
    def step_to(path: Path, step: str) -> tuple[Path, Choices]:
        assert f"--weights {label}" in step
        return path, Choices(weights=label)

    return step_to


def _without_flags(path: Path, step: str) -> tuple[Path, Choices]:
    return path, Choices()


def _documents(path: Path, step: str) -> tuple[Path, Choices]:
    """The pages exist, and the first lists the family of a file that loads."""
    pages = {page: (ROOT / page).read_text() for page in re.findall(r"docs/\w+\.md", step)}
    assert len(pages) == 2
    assert "official-rcan" in pages["docs/checkpoints.md"]
    assert "## A checkpoint dialect" in pages["docs/adding.md"]
    return _good(path, step)


def _full_state(path: Path, step: str) -> tuple[Path, Choices]:
    """The call that the step names, for real."""
    assert "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))" in step
    network = tree(official_rcan())
    network.load_state_dict(STATE)
    torch.save(get_model_state_dict(network, options=StateDictOptions(full_state_dict=True)), path)
    return path, Choices()


# ----------------------------------------------------------------------------------------------------------------------
# Files that are refused


def _compressed(method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as source, zipfile.ZipFile(stream, "w", method) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return stream.getvalue()


def _encrypted() -> bytes:
    data = bytearray(_compressed(zipfile.ZIP_STORED))
    at = data.find(b"PK\x01\x02")
    data[at + 8] |= 1
    return bytes(data)


def _zip_of(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("model.pth")
        entry.size = len(GOOD)
        archive.addfile(entry, io.BytesIO(GOOD))
    return stream.getvalue()


def _torchscript(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(_Named()).save(str(path))
    return path


class _Named(torch.nn.Module):
    """A module whose state dict is the network's, and which TorchScript takes."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in tree(official_rcan()).named_children():
            self.add_module(name, child)
        self.load_state_dict(STATE)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array({name: value.numpy() for name, value in STATE.items()}, dtype=object), allow_pickle=True)
    return stream.getvalue()


def _distributed(path: Path) -> Path:
    return save_distributed(path, {"model": dict(STATE)})


def _lost_chunk(path: Path) -> Path:
    _distributed(path.with_name("whole"))
    shutil.copytree(path.with_name("whole"), path)
    next(path.glob("*.distcp")).unlink()
    return path


def _folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        _written(path / name.replace("__", "."), data)
    return path


def _file(data: Callable[[], bytes]) -> Callable[[Path], Path]:
    return lambda path: _written(path, data())


def _saved(document: Any) -> Callable[[Path], Path]:
    return lambda path: _written(path, torch_file(document, legacy=False))


def _two_programs() -> bytes:
    name = "{}_weights_config.json"
    return _zip_of(**{f"a/data/weights/{name.format(each)}": b'{"config": {}}' for each in ("x", "y")})


def _one_program(path: Path, step: str) -> tuple[Path, Choices]:
    """What torch.export.save writes for one program; the reader's own tests use the real one."""
    config = {
        name: {
            "path_name": f"weight_{index}",
            "use_pickle": False,
            "tensor_meta": {
                "dtype": 7,
                "sizes": [{"as_int": size} for size in value.shape],
                "strides": [{"as_int": step} for step in value.stride()],
                "storage_offset": {"as_int": 0},
            },
        }
        for index, (name, value) in enumerate(STATE.items())
    }
    files = {f"a/data/weights/weight_{index}": value.numpy().tobytes() for index, value in enumerate(STATE.values())}
    files["a/data/weights/model_weights_config.json"] = json.dumps({"config": config}).encode()
    return _written(path.with_name("one.pt2"), _zip_of(**files)), Choices()


# What is refused, part of the step that is printed, and the step taken.
CASES: dict[str, tuple[Callable[[Path], Path], str, Step]] = {
    "truncated": (_file(lambda: GOOD[:-200]), "copy or download the file again", _good),
    "empty": (_file(lambda: b""), "copy or download it again", _good),
    "hostile": (
        _file(lambda: pickled(Call(Name("os", "system"), ("true",)))),
        "get the checkpoint from its authors, or ask them for the state_dict as safetensors",
        _safetensors,
    ),
    "names that leave a zip": (_file(lambda: _zip_of(**{"../x": b""})), "nothing was unpacked; get the", _good),
    "compressed with bzip2": (_file(lambda: _compressed(zipfile.ZIP_BZIP2)), "pack it again without", _stored),
    "encrypted": (_file(_encrypted), "unpack it with its password first", _good),
    "zip of a checkpoint": (
        _file(lambda: _zip_of(model__pth=GOOD)),
        "unpack it and pass the file model.pth",
        _extracted,
    ),
    "tar": (_file(_tar), "unpack it and pass the file inside", _extracted),
    "gzip": (_file(lambda: gzip.compress(GOOD)), "unpack it first", _unzipped),
    "HDF5": (_file(lambda: b"\x89HDF\r\n\x1a\n" + bytes(99)), "convert its weights to a PyTorch state_dict", _good),
    "Git LFS": (_file(lambda: b"version https://git-lfs.github.com/spec/v1\n"), "run: git lfs pull", _good),
    "web page": (_file(lambda: b"<!DOCTYPE html><html>"), "download it again", _good),
    "TorchScript": (_torchscript, "torch.jit.load(sys.argv[1]).state_dict()", _command),
    "pickle.dump": (_file(lambda: pickle.dumps(STATE)), "torch.save(pickle.load(open(sys.argv[1]", _command),
    "numpy.save": (_file(_npy), "numpy.savez(sys.argv[2]", _command),
    "one file of a distributed checkpoint": (
        lambda path: next(_distributed(path).glob("*.distcp")),
        "pass its folder",
        _passed,
    ),
    "a lost file of a distributed checkpoint": (
        _lost_chunk,
        "copy the whole folder again",
        lambda path, step: (path.with_name("whole"), Choices()),
    ),
    "a distributed checkpoint without metadata": (
        lambda path: _folder(path, __0_0__distcp=b"x"),
        "copy the whole folder again: its .metadata is missing",
        lambda path, step: (_distributed(path.with_name("whole")), Choices()),
    ),
    "folder": (lambda path: _folder(path, model__pth=GOOD), "pass the file", _passed),
    "folder of something": (lambda path: _folder(path, notes__txt=b""), "pass the checkpoint file itself", _good),
    "folder of DeepSpeed": (lambda path: _folder(path, zero_to_fp32__py=b""), "run the zero_to_fp32.py inside", _good),
    "folder of shards": (_shards, "join the shards first: python -c", _command),
    "several programs": (_file(_two_programs), "save the one that you want with torch.export.save", _one_program),
    "big-endian": (
        _file(lambda: GOOD.replace(b"little", b"biggg!")),
        "save its state_dict() as safetensors, which has one byte order",
        _safetensors,
    ),
    "8-bit floats": (
        _saved({name: value.to(torch.float8_e4m3fn) for name, value in STATE.items()}),
        "save the network's float32 state_dict()",
        _good,
    ),
    "no network": (_saved({"epoch": 3}), "save the network's state_dict() with torch.save", _good),
    "metadata that is not JSON": (
        _file(lambda: save_safetensors(STATE, metadata={"metadata": "{"})),
        "save the weights without it",
        _safetensors,
    ),
    "not finite": (_saved({**STATE, "head.0.bias": STATE["head.0.bias"] / 0}), "use an earlier checkpoint", _good),
    "unknown network": (
        _saved({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}),
        "docs/adding.md",
        _documents,
    ),
    "keys left over": (_saved({**STATE, "tail.9.weight": torch.zeros(2)}), "docs/checkpoints.md lists", _documents),
    "unexplained tensors": (
        _saved({f"model.{name}": value for name, value in STATE.items()} | {"refine.weight": torch.zeros(1)}),
        "if they do not change its output, pass --weights model",
        _weights("model"),
    ),
    "several networks": (
        _saved({"best_model": STATE, "last_model": OTHER}),
        "pass --weights best_model or --weights last_model",
        _weights("best_model"),
    ),
    "LoRA": (_saved({**STATE, "head.0.lora_A.weight": torch.zeros(1)}), "merge them into the weights", _good),
    "QAT": (_saved({**STATE, "head.0.weight_fake_quant.scale": torch.ones(1)}), "before prepare_qat", _good),
    "quantized": (_saved({**STATE, "head.0.zero_point": torch.zeros(1)}), "before it is converted", _good),
    "FSDP": (_saved({"_flat_param": torch.zeros(9), "x": torch.zeros(9)}), "get_model_state_dict", _full_state),
    "ZeRO-3": (_saved({name: torch.zeros(0) for name in STATE}), "run the zero_to_fp32.py that", _good),
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_leads_to_the_network(tmp_path: Path, name: str) -> None:
    make, expected, take = CASES[name]
    path = make(tmp_path / "refused")

    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    step = caught.value.next_step or ""
    loaded = load_checkpoint(*take(path, step))

    assert expected in step
    assert_network(loaded, STATE)


def test_an_image_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(image)

    with pytest.raises(InputError, match="pass the checkpoint first and images with their own option"):
        load_checkpoint(image)

    assert_network(load_checkpoint(_written(tmp_path / "net.pth", GOOD), probe_images=[image]), STATE)


def test_a_file_that_is_still_being_written(tmp_path: Path) -> None:
    path = _written(tmp_path / "net.pth", GOOD[:1000])

    with open_file_bytes(path) as file:
        file.size = len(GOOD)  # what another process promised
        with pytest.raises(RefusedError) as caught:
            file.buffer(0, len(GOOD), "content")
        path.write_bytes(GOOD)
        assert file.buffer(0, len(GOOD), "content") == GOOD

    assert caught.value.next_step == "wait until it is fully written"


@pytest.mark.parametrize(
    ("choices", "step"),
    [(Choices(res_scale=0.5), "omit the flag"), (Choices(group_skip=False), "omit the flag")],
    ids=["contradicts the family", "contradicts the family's structure"],
)
def test_a_flag_that_contradicts_the_file(tmp_path: Path, choices: Choices, step: str) -> None:
    path = _written(tmp_path / "net.pth", GOOD)

    with pytest.raises(UsageError, match=step):
        load_checkpoint(path, choices)

    assert_network(load_checkpoint(path), STATE)


# ----------------------------------------------------------------------------------------------------------------------
# No step is forgotten


def printed_steps() -> Iterator[tuple[str, str]]:
    """Yield the module and the constant text of every next step in models/."""
    for path in sorted((ROOT / "models").rglob("*.py")):
        module = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value
            for node in ast.walk(module)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(module):
            for keyword in getattr(node, "keywords", []):
                if keyword.arg == "next_step":
                    for text in _texts(keyword.value, constants):
                        yield path.name, text
    for _, _, step in _OTHER_FILES:
        yield "containers.py", step
    for cause in _CAUSES:
        yield "causes.py", cause.next_step


def _texts(node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the longest constant part of each text that an expression can be."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body, constants)
        yield from _texts(node.orelse, constants)
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from _texts(constants[node.id], constants)
    elif isinstance(node, ast.JoinedStr):
        yield max((str(part.value) for part in node.values if isinstance(part, ast.Constant)), key=len)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


TAKEN_ELSEWHERE = {
    "omit the flag",
    "wait until it is fully written",
    "pass the checkpoint first and images with their own option",
    # test_folding.py
    "remove it before saving, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove",
    # test_resolve.py
    "pass the flags, or probe with more and larger images",
    "pass the flags",
}


def test_every_step_that_is_printed_is_taken() -> None:
    taken = [expected for _, expected, _ in CASES.values()]

    untaken = {
        f"{module}: {text}"
        for module, text in printed_steps()
        if text not in TAKEN_ELSEWHERE and not any(part in text or text.strip() in part for part in taken)
    }

    assert untaken == set()
    assert len(list(printed_steps())) > 60
