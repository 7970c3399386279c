"""Next steps of upscaling images and folders: tiles, graphs, formats of outputs, huge images, journals."""

import re
import shutil
import struct
import tempfile
import time
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from next_steps.conftest import User, photo
from next_steps.test_calibration import changed_weights
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, PngImagePlugin

from srdeploy.core.contract import INPUT, ModelContract
from srdeploy.core.errors import CapabilityError, GateError, UsageError
from srdeploy.upscale.folders import refuse_mixed_engines, upscale_folder
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts
from srdeploy.upscale.torch_images import upscale_tensor
from srdeploy.upscale.upscaler import Upscaler

LARGE = "photos/0.png --threads 1"
"""An image of 112x96 pixels."""
TILES = "--tiles overlapped --tile 48"


def save_deep(path: str) -> None:
    """Write a picture of 16 bits."""
    Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.advice("upscale/budget.py:_whole", "leave out --tiles whole")
@pytest.mark.advice("upscale/budget.py:_window", "choose a --tile within the engine's shapes")
def test_tiles_of_a_graph_with_one_shape(user: User) -> None:
    user.runs("export good.onnx --static 1x3x48x48 -o static.onnx")

    user.refused(f"upscale static.onnx {LARGE} --tiles whole -o a.png")
    user.runs(f"upscale static.onnx {LARGE} -o a.png")
    user.refused(f"upscale static.onnx {LARGE} --tile 97 -o b.png")
    user.runs(f"upscale static.onnx {LARGE} --tile 48 -o b.png")


@pytest.mark.advice(
    "upscale/tiles.py:_plan_axis", "allow more memory (--memory) or larger tiles (--tile), or choose a "
)
def test_tiles_that_are_all_overlap(user: User) -> None:
    user.refused(f"upscale good.onnx {LARGE} --tiles overlapped --tile 20 -o a.png")
    user.runs(f"upscale good.onnx {LARGE} --tiles overlapped --tile 40 -o a.png")
    user.runs(f"upscale good.onnx {LARGE} --tiles overlapped --tile 20 --overlap 4 -o b.png")
    user.refused(f"upscale good.onnx {LARGE} --tiles overlapped --memory 64KiB --overlap 40 -o c.png")
    user.runs(f"upscale good.onnx {LARGE} --tiles overlapped --memory 1GiB --overlap 40 -o c.png")


# ----------------------------------------------------------------------------------------------------------------------
# Outputs of networks


def with_nan(source: str, name: str) -> None:
    """Write a graph whose last convolution has a bias of NaN."""
    model = onnx.load(source)
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    (bias,) = (each for each in model.graph.initializer if each.name == last.input[2])
    bias.CopyFrom(numpy_helper.from_array(np.full(list(bias.dims), np.nan, np.float32), bias.name))
    onnx.save(model, name)


@pytest.mark.advice("upscale/guards.py:Guard._again", "use a bundle or --fallback model.fp32.onnx, or an FP32 engine")
@pytest.mark.advice("upscale/guards.py:check_rows", "use --tiles overlapped with --fallback, or the FP32 model")
def test_int8_that_returns_no_picture(user: User) -> None:
    with_nan("int8.onnx", "bad.onnx")

    user.refused("upscale bad.onnx photo.png -o a.png")
    assert not Path("a.png").exists()
    user.runs("upscale bad.onnx photo.png --fallback good.onnx -o a.png")
    user.runs("upscale good.onnx photo.png -o b.png")
    user.refused(f"upscale bad.onnx {LARGE} --tiles exact --tile 48 -o c.png")
    user.runs(f"upscale bad.onnx {LARGE} {TILES} --fallback good.onnx -o c.png")
    user.runs(f"upscale good.onnx {LARGE} --tiles exact --tile 48 -o d.png")


@pytest.mark.advice("upscale/guards.py:Guard._again", "srdeploy verify MODEL.onnx --against CHECKPOINT --images IMAGES")
@pytest.mark.advice("upscale/guards.py:check_rows", "srdeploy verify MODEL.onnx --against CHECKPOINT --images IMAGES")
def test_fp32_that_returns_no_picture(user: User) -> None:
    """Another precision does not help."""
    with_nan("good.onnx", "bad.onnx")
    with_nan("int8.onnx", "int8.onnx")

    user.refused(f"upscale bad.onnx {LARGE} --tiles exact --tile 48 -o a.png")
    user.refused("upscale int8.onnx photo.png --fallback bad.onnx -o a.png")
    message = user.refused("upscale bad.onnx photo.png -o a.png")
    advised = (
        message[message.index("srdeploy verify") :].replace("CHECKPOINT", "good.pt").replace("IMAGES", "photo.png")
    )
    code, printed = user.types(advised.replace("MODEL.onnx", "bad.onnx"))
    assert code == 6
    assert "NaN" in printed
    user.runs(advised.replace("MODEL.onnx", "good.onnx"))


@pytest.mark.advice("upscale/torch_images.py:_on_gpu", "pass the tensor on the CPU to use the fallback")
def test_tensors_whose_result_is_no_picture(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's tensors are the CPU's here: only the name of their device is a GPU's."""
    changed_weights(lambda weights: weights * np.float32(np.nan), "bad.onnx")
    image = torch.from_numpy(np.asarray(photo(20, 24, 1)).copy()).permute(2, 0, 1).float()[None] / 255

    class OnGpu(torch.Tensor):
        device = torch.device("cuda:0")  # type: ignore[assignment]

    with Upscaler.open(Path("bad.onnx"), threads=1, fallback=Path("good.onnx")) as up:

        def run_tensors(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            made = up.runner.run({INPUT: feeds[INPUT].as_subclass(torch.Tensor).numpy()})
            return {name: torch.from_numpy(value) for name, value in made.items()}

        monkeypatch.setattr(type(up.runner), "run_tensors", staticmethod(run_tensors), raising=False)
        with pytest.raises(GateError):
            upscale_tensor(up, image.as_subclass(OnGpu))
        made = upscale_tensor(up, image)

    with Upscaler.open(Path("good.onnx"), threads=1) as good:
        torch.testing.assert_close(made, upscale_tensor(good, image))


@pytest.mark.advice("upscale/upscaler.py:Upscaler.runner", "use it inside its with block")
def test_a_closed_upscaler(user: User) -> None:
    pixels = np.asarray(photo(20, 24, 1))
    with Upscaler.open(Path("good.onnx"), threads=1) as up:
        assert up(pixels).shape[0] > 20
    with pytest.raises(UsageError):
        up(pixels)


# ----------------------------------------------------------------------------------------------------------------------
# Graphs


@pytest.mark.advice("upscale/model_files.py:find_models", "if it is a checkpoint: srdeploy export ")
def test_a_checkpoint_is_exported_first(user: User) -> None:
    message = user.refused("upscale good.pt photo.png -o a.png")

    user.runs(message[message.index("srdeploy export") :])
    user.runs("upscale model.onnx photo.png -o a.png")


@pytest.mark.advice("upscale/lock_step.py:lock_step_of", "use --tiles overlapped, or the graph that it was made from")
@pytest.mark.advice("upscale/lock_step.py:lock_step_of", "use --tiles overlapped, or the bundle's model.fp32.onnx")
def test_what_cannot_be_cut_into_stages(user: User) -> None:
    user.runs("export good.onnx --io uint8 -o levels.onnx")
    user.runs("build good.onnx --engine onnxruntime -o good.engine")
    exact = f"{LARGE} --tiles exact --tile 48"

    for model in ("levels.onnx", "good.engine"):
        user.refused(f"upscale {model} {exact} -o a.png")
        user.runs(f"upscale {model} {LARGE} {TILES} -o {model}.png")
    user.runs(f"upscale good.onnx {exact} -o b.png")


@pytest.mark.advice(
    "upscale/lock_step.py:LockStep._check_space", "set TMPDIR to a larger disk, or use --tiles overlapped"
)
def test_feature_maps_that_the_disk_does_not_hold(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full as far as the check can see; TMPDIR is on another one."""
    real, larger = shutil.disk_usage, user.folder / "larger"
    larger.mkdir()

    def usage(path: Path) -> Any:
        return real(path) if Path(path).is_relative_to(larger) else SimpleNamespace(total=1, used=1, free=0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    command = f"upscale good.onnx {LARGE} --memory 1MiB"

    user.refused(f"{command} --tiles exact -o a.png")
    user.runs(f"{command} --tiles overlapped --overlap 4 -o a.png")
    monkeypatch.setenv("TMPDIR", str(larger))
    monkeypatch.setattr(tempfile, "tempdir", None)  # as in a new process
    user.runs(f"{command} --tiles exact -o b.png")
    assert not list(larger.iterdir())


def attention(path: str, operation: str) -> None:
    """Write a network in which an operation on the input follows a mean over the whole image."""
    contract = ModelContract.from_metadata(
        {each.key: each.value for each in onnx.load("good.onnx").metadata_props}, name="good.onnx"
    )
    weights = np.repeat(np.eye(3, dtype=np.float32), contract.scale**2, axis=0)[..., None, None]
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node(operation, ["input", "mean"] if operation == "Mul" else ["input"], ["weighted"]),
        helper.make_node("Add", ["weighted", "mean"], ["gated"]),
        helper.make_node("Conv", ["gated", "weights"], ["repeated"], kernel_shape=[1, 1]),
        helper.make_node("DepthToSpace", ["repeated"], ["output"], blocksize=contract.scale, mode="CRD"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h2", "w2"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, path)


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param("Mul", marks=pytest.mark.advice("upscale/lock_step.py:_StageRows._input", "--tiles overlapped")),
        pytest.param(
            "Softmax", marks=pytest.mark.advice("upscale/network_cuts.py:_maps_and_pools", "use --tiles overlapped")
        ),
    ],
)
def test_networks_without_exact_tiles(user: User, operation: str) -> None:
    attention("a.onnx", operation)

    user.refused(f"upscale a.onnx {LARGE} --tiles exact --tile 48 -o a.png")
    user.runs(f"upscale a.onnx {LARGE} {TILES} -o a.png")


@pytest.mark.advice(
    "upscale/planes.py:Conversion.planes",
    "use the float graph that it was made from, or export with --color-wrapper --io uint8",
)
def test_pixels_that_a_graph_of_8_bit_levels_does_not_take(user: User) -> None:
    save_deep("deep.png")
    user.runs("export good.onnx --io uint8 -o levels.onnx")
    user.runs("export luma.pt -o luma.onnx")
    user.runs("export luma.onnx --io uint8 -o luma_levels.onnx")

    user.refused("upscale levels.onnx deep.png -o a.png")
    user.runs("upscale good.onnx deep.png -o a.png")
    user.refused("upscale luma_levels.onnx photo.png -o b.png")
    user.runs("export luma.onnx --color-wrapper --io uint8 -o colors.onnx")
    user.runs("upscale colors.onnx photo.png -o b.png")


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("source", "output", "suffixes"),
    [
        pytest.param(
            "photo.png",
            "a.png --quality 80",
            ".jpg .webp",
            marks=pytest.mark.advice("upscale/image_writer.py:check_quality", "a .jpg or .webp output"),
        ),
        pytest.param(
            "photo.png",
            "a.xyz",
            ".png .jpg .jpeg .jfif .webp .tif .tiff",
            marks=pytest.mark.advice("upscale/image_writer.py:check_output", "a name ending in "),
        ),
        pytest.param(
            "photo.png",
            "a.png --float",
            ".tif",
            marks=pytest.mark.advice("upscale/image_writer.py:check_output", "a .tif output"),
        ),
        pytest.param(
            "deep.png",
            "a.jpg",
            ".png .tif",
            marks=pytest.mark.advice("upscale/image_writer.py:check_output", "a .png or .tif output"),
        ),
        pytest.param(
            "wide.png",
            "a.webp",
            ".png .tif",
            marks=pytest.mark.advice("upscale/image_writer.py:check_output", "a .png or .tif output"),
        ),
        pytest.param(
            "clear.png",
            "a.jpg",
            ".png .webp .tif",
            marks=pytest.mark.advice("upscale/image_writer.py:check_output", "a .png, .webp or .tif output"),
        ),
        pytest.param(
            "photo.png",
            "photo.png --force",
            ".png",
            marks=pytest.mark.advice("upscale/single_image.py:refuse_same", "choose another output name"),
        ),
    ],
)
def test_outputs(user: User, source: str, output: str, suffixes: str) -> None:
    save_deep("deep.png")
    photo(4, 8200, 1).save("wide.png")
    clear = photo(20, 24, 1).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((24, 20)))
    clear.save("clear.png")

    message = user.refused(f"upscale good.onnx {source} -o {output}")

    named = re.findall(r"\.[a-z]+\b", message.partition("expected ")[2])
    assert named in (suffixes.split(), [])
    options = output.partition(" ")[2]
    for suffix in suffixes.split():
        user.runs(f"upscale good.onnx {source} -o other{suffix} {options}")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every image for one that does not fit in memory."""
    pytest.importorskip("pyvips", reason="pyvips is not installed: pip install 'srdeploy[huge]'")
    monkeypatch.setattr("srdeploy.upscale.single_image.MAX_PIXELS", 1)


@pytest.mark.advice("upscale/huge.py:StreamedSource.__init__", "save it again without interlacing")
@pytest.mark.advice("core/imaging/decoders.py:not_decoded", "download or copy it again")
@pytest.mark.advice("core/imaging/read.py:full_page", "convert it to RGB first")
@pytest.mark.advice("upscale/huge.py:check_header", "download or copy it again: the header is damaged")
@pytest.mark.advice("upscale/huge.py:upscale_streamed", "a .png or .tif output")
def test_huge_images(user: User, streamed: None) -> None:
    import pyvips

    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save("whole.png")
    command = "upscale good.onnx a.png --tile 64 --tiles overlapped --threads 1 -o out.png --force"
    data = Path("whole.png").read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes(20) + data[middle + 20 :]
    claimed = bytearray(data)
    struct.pack_into(">II", claimed, 16, 100_000, 90_000)
    struct.pack_into(">I", claimed, 29, zlib.crc32(bytes(claimed[12:29])))
    for damaged in (changed, bytes(claimed)):
        Path("a.png").write_bytes(damaged)
        assert "download or copy it again" in user.refused(command)
        assert not Path("out.png").exists()
    shutil.copy("whole.png", "a.png")
    user.runs(command)
    pyvips.Image.new_from_array(noise).pngsave("a.png", interlace=True)
    user.refused(command)
    Image.open("a.png").save("a.png")
    user.runs(command)
    with Image.open("a.png") as picture:
        picture.convert("YCbCr").save("b.tif")
        picture.save("c.tif")
    user.refused(command.replace("a.png", "b.tif"))
    user.runs(command.replace("a.png", "c.tif"))
    user.refused(command.replace("out.png", "out.webp"))
    user.runs(command.replace("out.png", "out.tif"))


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.advice(
    "upscale/folders.py:FolderReport.raise_failures", "fix these and run the same command again, it skips"
)
@pytest.mark.advice("upscale/scale/targets.py:find_targets", "rename one of them")
@pytest.mark.advice("upscale/scale/targets.py:find_targets", "rename it")
@pytest.mark.advice("upscale/scale/status.py:folder_status", "the output folder of srdeploy upscale FOLDER -o OUT")
def test_folders_with_failures(user: User) -> None:
    whole = Path("photos/0.png").read_bytes()
    Path("photos/0.png").write_bytes(whole[:100])
    command = "upscale good.onnx photos -o out --threads 1 --format png"
    user.refused("upscale --status photos")

    user.refused(command)
    assert "1 failed" in user.runs("upscale --status out")
    Path("photos/0.png").write_bytes(whole)
    before = Path("out/1.png").stat().st_mtime_ns
    user.runs(command)
    assert Path("out/1.png").stat().st_mtime_ns == before
    photo(20, 24, 5).save("photos/1.jpg")
    user.refused(command)
    Path("photos/1.jpg").rename("photos/one.jpg")
    user.runs(command)
    longest = Path("photos", "y" * 251 + ".jpg")
    shutil.copy("photos/one.jpg", longest)
    user.refused(command.replace("png", "webp").replace("out", "webp"))
    longest.rename("photos/two.jpg")
    user.runs(command.replace("png", "webp").replace("out", "webp"))


@pytest.mark.advice("upscale/folders.py:FolderReport.advice", "--format webp --quality 95 encodes faster, and so does ")
def test_encoding_that_limits_the_speed(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deflate takes an hour more by the clock here, so that it is the slowest on any machine; JPEG does not run it."""
    real, hours = PngImagePlugin._save, []

    def slow(*arguments: Any, **options: Any) -> None:
        hours.append(3600.0)
        real(*arguments, **options)

    monkeypatch.setitem(Image.SAVE, "PNG", slow)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(hours))
    monkeypatch.setattr("srdeploy.upscale.folders.time", clock)
    printed = user.runs("upscale good.onnx photos -o out --threads 1")

    assert "encodes faster" in printed
    for options in re.findall(r"--format \w+(?: --quality \d+)?", printed):
        shutil.rmtree("out")
        assert "encodes faster" not in user.runs(f"upscale good.onnx photos -o out --threads 1 {options}")
    shutil.rmtree("photos")
    Path("photos").mkdir()
    save_deep("photos/deep.png")
    assert "encodes faster" not in user.runs("upscale good.onnx photos -o deep --threads 1")  # only PNG holds these


@pytest.mark.advice(
    "upscale/folders.py:refuse_mixed_engines", "choose with --engine and --precision, or pass --mixed-engines"
)
def test_devices_that_open_different_engines(user: User) -> None:
    """The two engines are the CPU's; the two GPUs are names."""
    with ExitStack() as stack:
        ups = [
            stack.enter_context(Upscaler.open(Path("good.onnx"), engine=engine, threads=1))
            for engine in ("onnxruntime", "openvino", "openvino")
        ]
        with pytest.raises(CapabilityError):
            refuse_mixed_engines({"cuda:0": ups[0].identity, "cuda:1": ups[1].identity})
        refuse_mixed_engines({"cuda:0": ups[1].identity, "cuda:1": ups[2].identity})
        report = upscale_folder(ups[:2], Path("photos"), Path("out"), mixed_engines=True)
    assert len(report.made) == 4


@pytest.mark.advice(
    "upscale/scale/folder_journal.py:FolderJournal._refuse_other_settings",
    "wait for it, or choose another output folder",
)
def test_another_run_in_the_output_folder(user: User) -> None:
    with FolderJournal(Path("out"), RunFacts(key="another", source="photos", suffix=None, total=4)):
        user.refused("upscale good.onnx photos -o out --threads 1")
        user.runs("upscale good.onnx photos -o other --threads 1")
    user.runs("upscale good.onnx photos -o out --threads 1")
