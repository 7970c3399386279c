"""A workshop for the command line's tests: small files of every kind, good and bad, and the artifacts made of them."""

import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoint_fuzzing.pickles import Call, Name, zip_file
from checkpoint_fuzzing.seeds import official_rcan, random_state, torch_file, yjn870_srdensenet
from PIL import Image

from srdeploy.cli.main import run


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, standard output, and its error lines."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


Command = Callable[..., Outcome]


@pytest.fixture
def srdeploy(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""

    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share an empty engine cache between the fixtures and tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def write_waves(folder: Path, height: int, width: int, *, dark_corner: bool = False) -> Path:
    """Write eight smooth, colorful pictures: waves of several directions, with an edge."""
    y, x = np.mgrid[0:height, 0:width] / 16.0
    for index in range(8):
        waves = [np.sin(x * (0.3 + index * 0.2) + c) + np.cos(y * (0.5 + 0.3 * c) - index) for c in range(3)]
        pixels = 127 + 55 * np.stack(waves, axis=-1)
        pixels[:, 48 + index :] *= 0.6
        if dark_corner:
            pixels[:8, :8] = 0
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"photo{index}.png")
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad checkpoints, pictures, graphs and engines; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("workshop")
    _checkpoints(folder)
    _pictures(folder)
    _made(["export", folder / "good.pt", "-o", folder / "good.onnx"])
    _made(["build", folder / "good.onnx", "--engine", "openvino", "--no-cache", "-o", folder / "good.engine"])
    _graphs(folder)
    _engines(folder)
    return folder


def _made(arguments: Sequence[object]) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def _checkpoints(folder: Path) -> None:
    good = torch_file(random_state(official_rcan()), legacy=False)
    (folder / "good.pt").write_bytes(good)
    (folder / "luma.pth").write_bytes(torch_file(random_state(yjn870_srdensenet()), legacy=True))
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "truncated.pt").write_bytes(good[: len(good) // 2])
    (folder / "empty_state.pt").write_bytes(torch_file({"state_dict": {}}, legacy=False))
    (folder / "wrong_network.pt").write_bytes(torch_file({"features.0.weight": torch.ones(3, 3, 3, 3)}, legacy=False))
    evil = Call(Name("os", "system"), (f"touch {folder / 'canary'}",))
    (folder / "evil.pt").write_bytes(zip_file({"weight": evil}))


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Return a smooth colourful picture: calibration refuses noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _pictures(folder: Path) -> None:
    for name in ("photos", "no_photos", "text_only", "no_real_photos", "one_bad_photo"):
        (folder / name).mkdir()
    for seed in range(4):
        photo(96, 112, seed).save(folder / "photos" / f"{seed}.png")
    photo(20, 24, 9).save(folder / "photo.png")
    photo(96, 112, 9).save(folder / "one_bad_photo" / "b.png")
    (folder / "text_only" / "notes.txt").write_text("no picture")
    for place in ("no_real_photos/a.png", "one_bad_photo/a.png", "text.png"):
        (folder / place).write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    data = (folder / "photo.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "bomb.png").write_bytes(_bomb(100_000))


def _bomb(side: int) -> bytes:
    """A PNG of a kilobyte that claims `side` x `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _graphs(folder: Path) -> None:
    data = (folder / "good.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(data[: len(data) // 2])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "text.onnx").write_text("hello")
    foreign = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> relu (float[n,3,h,w] x) => (float[n,3,h,w] y) { y = Relu (x) }'
    )
    onnx.save(foreign, folder / "foreign.onnx")
    cut = onnx.load(folder / "good.onnx")
    del cut.graph.node[3:]
    onnx.save(cut, folder / "cut.onnx")
    damaged = onnx.load(folder / "good.onnx")
    for entry in damaged.metadata_props:
        entry.value = '{"broken'
    onnx.save(damaged, folder / "bad_metadata.onnx")
    outside = onnx.load(folder / "good.onnx")
    weights = outside.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../../../etc/passwd")
    (folder / "outside.onnx").write_bytes(outside.SerializeToString())


def _engines(folder: Path) -> None:
    for name in ("changed", "alone", "bad_sidecar", "thin_sidecar"):
        shutil.copy(folder / "good.engine", folder / f"{name}.engine")
        shutil.copy(folder / "good.engine.json", folder / f"{name}.engine.json")
    with (folder / "changed.engine").open("r+b") as stream:
        stream.seek(50)
        stream.write(b"changed")
    (folder / "alone.engine.json").unlink()
    (folder / "bad_sidecar.engine.json").write_text('{"schema": 1')
    (folder / "thin_sidecar.engine.json").write_text("[]")
