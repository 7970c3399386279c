"""Next steps about outputs, pictures, manifests and packages."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from next_steps.conftest import User, photo
from next_steps.inventory import ROOT
from PIL import Image

from srdeploy.core.errors import UsageError
from srdeploy.core.imaging import png_chunks
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.samples import SampleFolder
from srdeploy.upscale import single_image

UPSCALE = "upscale good.onnx {} -o out.png"


# ----------------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.advice("core/artifact.py:refuse_existing", "choose another name, or pass --force to replace it")
@pytest.mark.parametrize(
    "command",
    [
        "quantize good.onnx --precision fp16 -o there.onnx",
        "build good.onnx --engine onnxruntime -o there.onnx",
        "upscale good.onnx photo.png -o there.png",
    ],
)
def test_an_output_that_exists(user: User, command: str) -> None:
    for name in ("there.onnx", "there.png"):
        (user.folder / name).write_text("older")

    user.refused(command)
    user.runs(f"{command} --force")
    user.runs(command.replace("there", "other"))


@pytest.mark.advice("core/artifact.py:atomic_files", "choose another output name")
def test_an_output_file_that_is_a_folder(user: User) -> None:
    (user.folder / "model.onnx").mkdir()

    assert "a file" in user.refused("quantize good.onnx --precision fp16 -o model.onnx --force")
    user.runs("quantize good.onnx --precision fp16 -o model2.onnx")


@pytest.mark.advice("core/artifact.py:refuse_input_as_output", "choose another output name")
def test_an_output_that_is_the_input(user: User) -> None:
    user.refused("quantize good.onnx --precision fp16 -o good.onnx --force")
    user.runs("quantize good.onnx --precision fp16 -o half.onnx")


VERIFY = "verify good.onnx --against good.pt --images photo.png"


@pytest.mark.advice("core/artifact.py:_refuse_folder", "choose another output name")
def test_an_output_folder_that_is_a_file(user: User) -> None:
    (user.folder / "report").write_text("mine")

    user.refused(f"{VERIFY} --report report --force")
    user.runs(f"{VERIFY} --report report2")


@pytest.mark.advice(
    "core/artifact.py:_refuse_folder", "choose another name; --force does not remove other people's files"
)
def test_an_output_folder_of_other_files(user: User) -> None:
    user.refused(f"{VERIFY} --report photos --force")
    user.runs(f"{VERIFY} --report report")
    user.runs(f"{VERIFY} --report report --force")


@pytest.mark.advice("core/artifact.py:_make_folder", "choose another folder")
def test_an_output_inside_a_file(user: User) -> None:
    user.refused("upscale good.onnx photo.png -o good.pt/out.png")
    user.runs("upscale good.onnx photo.png -o folder/out.png")


@pytest.mark.advice("core/artifact.py:_output_error", "choose a folder you can write to")
def test_a_folder_that_takes_no_files(user: User) -> None:
    """/proc takes none from anybody, root included."""
    user.refused("quantize good.onnx --precision fp16 -o /proc/model.onnx")
    user.runs("quantize good.onnx --precision fp16 -o model.onnx")


@pytest.mark.tmpfs
@pytest.mark.advice("core/artifact.py:_output_error", "free some space")
def test_a_full_disk(user: User, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(100_000))
    command = f"upscale good.onnx photos/0.png -o {small_disk}/out.png"

    user.refused(command)
    (small_disk / "other").unlink()
    user.runs(command)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def copied_again(user: User, path: Path, intact: bytes) -> None:
    """Follow "download or copy it again": a damaged file is refused, its intact copy is read."""
    path.write_bytes(intact[: len(intact) * 2 // 3])
    user.refused(UPSCALE.format(path))
    path.write_bytes(intact)
    user.runs(UPSCALE.format(path))


@pytest.mark.advice("core/imaging/read.py:opened", "download or copy it again")
def test_a_truncated_picture(user: User) -> None:
    copied_again(user, Path("photo.png"), Path("photo.png").read_bytes())


@pytest.mark.advice("core/imaging/decoders.py:wide_ppm", "download or copy it again")
def test_a_truncated_picture_of_16_bits_in_ppm(user: User) -> None:
    copied_again(user, Path("a.ppm"), b"P6 24 20 65535\n" + np.arange(24 * 20 * 3, dtype=">u2").tobytes())


@pytest.mark.advice("core/imaging/decoders.py:check_tiff", "download or copy it again")
def test_a_tiff_without_its_directory(user: User) -> None:
    """libvips writes the directory last."""
    vips = pytest.importorskip("pyvips")
    noise = np.random.default_rng(0).integers(0, 65536, (40, 48, 3), dtype=np.uint16)
    vips.Image.new_from_array(noise).copy(interpretation="rgb16").tiffsave("a.tif")

    copied_again(user, Path("a.tif"), Path("a.tif").read_bytes())


@pytest.mark.advice("core/imaging/decoders.py:not_decoded", "download or copy it again")
def test_a_damaged_tiff_of_16_bits(user: User) -> None:
    vips = pytest.importorskip("pyvips")
    noise = np.random.default_rng(0).integers(0, 65536, (40, 48, 3), dtype=np.uint16)
    vips.Image.new_from_array(noise).copy(interpretation="rgb16").tiffsave("a.tif", compression="deflate")
    intact = Path("a.tif").read_bytes()
    Path("a.tif").write_bytes(intact[:8] + bytes(len(intact) - 2008) + intact[-2000:])

    user.refused(UPSCALE.format("a.tif"))
    Path("a.tif").write_bytes(intact)
    user.runs(UPSCALE.format("a.tif"))


@pytest.mark.advice("core/imaging/decoders.py:_too_many_samples", "save it without the additional channels first")
def test_a_picture_of_six_channels(user: User) -> None:
    vips = pytest.importorskip("pyvips")
    six = vips.Image.new_from_array(np.full((20, 24, 6), 90, np.uint8)).copy(interpretation="srgb")
    six.tiffsave("six.tif")

    user.refused(UPSCALE.format("six.tif"))
    six.extract_band(0, n=3).tiffsave("six.tif")
    user.runs(UPSCALE.format("six.tif"))


@pytest.mark.advice("core/imaging/decoders.py:_unread_compression", "save it with one of these first")
def test_a_tiff_of_an_unread_compression(user: User) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.asarray(photo(20, 24, 0))
    tifffile.imwrite("a.tif", pixels, photometric="rgb")
    intact = Path("a.tif").read_bytes()
    at = intact.index(b"\x03\x01\x03\x00\x01\x00\x00\x00")
    Path("a.tif").write_bytes(intact[: at + 8] + (50001).to_bytes(2, "little") + intact[at + 10 :])

    message = user.refused(UPSCALE.format("a.tif"))
    for name, compression in (("LZW", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("PackBits", "packbits")):
        assert name in message
        photo(20, 24, 0).save("b.tif", compression=compression)
        user.runs(UPSCALE.format("b.tif") + " --force")


@pytest.mark.advice("core/imaging/read.py:opened", "convert it to PNG or TIFF first")
def test_a_picture_in_another_format(user: User) -> None:
    photo(20, 24, 0).save("a.png")
    Path("a.jxl").write_bytes(bytes.fromhex("0000000c4a584c200d0a870a") + bytes(40))

    user.refused(UPSCALE.format("a.jxl"))
    user.runs(UPSCALE.format("a.png"))
    photo(20, 24, 0).save("a.tif")
    user.runs(UPSCALE.format("a.tif") + " --force")


@pytest.mark.advice(
    "core/imaging/read.py:opened", "convert it in an image editor first; floating-point TIFF is written"
)
def test_a_picture_of_floating_point_numbers(user: User) -> None:
    user.runs("upscale good.onnx photo.png -o float.tif --float")

    user.refused(UPSCALE.format("float.tif"))
    pytest.importorskip("pyvips").Image.new_from_file("float.tif").cast("uchar").pngsave("whole.png")
    user.runs(UPSCALE.format("whole.png"))


@pytest.mark.advice("core/imaging/read.py:opened", "save it without its text first")
def test_a_picture_with_more_text_than_is_read(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for number in range(2):
        info.add_text(f"workflow {number}", "a" * (png_chunks.MAX_BYTES * 6 // 10), zip=True)
    picture = photo(20, 24, 0)
    picture.save("a.png", pnginfo=info)

    user.refused(UPSCALE.format("a.png"))
    picture.save("a.png")
    user.runs(UPSCALE.format("a.png"))


@pytest.mark.advice("core/imaging/read.py:_check_header", "split it into single pictures, or make it a video, first")
def test_an_animation(user: User) -> None:
    av = pytest.importorskip("av")
    frames = [photo(20, 24, seed) for seed in range(3)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])

    user.refused(UPSCALE.format("a.gif"))
    frames[0].save("first.gif")
    user.runs(UPSCALE.format("first.gif"))
    with av.open("a.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 20, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode(None))
    user.runs("upscale good.onnx a.mp4 -o out.mp4")


@pytest.mark.advice(
    "core/imaging/read.py:_check_header", "convert it to RGB with its colour profile in an image editor first"
)
def test_a_picture_for_printing(user: User) -> None:
    photo(20, 24, 0).convert("CMYK").save("a.jpg")

    user.refused(UPSCALE.format("a.jpg"))
    with Image.open("a.jpg") as picture:
        picture.convert("RGB").save("a.png")
    user.runs(UPSCALE.format("a.png"))


@pytest.mark.advice(
    "core/imaging/read.py:_too_large", "srdeploy upscale streams larger PNG, TIFF and JPEG files; elsewhere use crops"
)
def test_a_picture_larger_than_is_decoded(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is 89 million pixels; here it is lowered below the picture's."""
    pytest.importorskip("pyvips")
    Image.MAX_IMAGE_PIXELS = None
    Image.new("1", (10_000, 10_000)).save("large.png")

    user.refused("verify good.onnx --against good.pt --images large.png")
    with Image.open("large.png") as picture:
        picture.crop((0, 0, 24, 20)).save("crop.png")
    user.runs("verify good.onnx --against good.pt --images crop.png")
    monkeypatch.setattr(single_image, "MAX_PIXELS", 400)  # photo.png is larger: streaming 100 million takes minutes
    assert "cannot be streamed" in user.refused("upscale good.onnx photo.png -o out.webp")
    user.runs(UPSCALE.format("photo.png"))


@pytest.mark.advice("core/samples.py:SampleFolder.__init__", "name a folder with --images, --hr or both")
def test_samples_without_a_folder(user: User) -> None:
    contract = read_graph(Path("good.onnx")).contract

    with pytest.raises(UsageError):
        SampleFolder(None, None, contract=contract)
    photos = Path("photos")
    for images, truth in ((photos, None), (None, photos)):
        assert len(SampleFolder(images, truth, contract=contract)) == 4


@pytest.mark.advice("core/samples.py:_paired", " given with --hr")
def test_a_picture_without_ground_truth(user: User) -> None:
    Path("low").mkdir()
    photo(48, 56, 0).save("low/first.png")
    command = "verify good.onnx --against good.pt --images low --hr photos"

    assert "a file named first.*" in user.refused(command)
    Path("photos/0.png").rename("photos/first.png")
    user.runs(command)


# ----------------------------------------------------------------------------------------------------------------------
# Files of srdeploy


@pytest.mark.advice(
    "core/contract.py:ModelContract.from_metadata",
    "export it from the checkpoint with: srdeploy export CHECKPOINT -o model.onnx",
)
@pytest.mark.advice("core/onnx_file.py:read_graph", "a file written by srdeploy export")
def test_an_onnx_file_of_others(user: User) -> None:
    plain = onnx.load("good.onnx")
    del plain.metadata_props[:]
    onnx.save(plain, "plain.onnx")
    Path("text.onnx").write_text("hello")

    message = user.refused("build plain.onnx --engine onnxruntime -o a.engine")
    user.refused("build text.onnx --engine onnxruntime -o a.engine")
    advised = re.search(r"srdeploy export CHECKPOINT -o model.onnx", message)
    assert advised is not None
    user.runs(advised[0].replace("CHECKPOINT", "good.pt"))
    user.runs("build model.onnx --engine onnxruntime -o a.engine")


@pytest.mark.advice("core/onnx_file.py:_load_external", "copy the weights file to the ONNX file's folder")
def test_weights_that_are_elsewhere(user: User) -> None:
    Path("large").mkdir()
    onnx.save(
        onnx.load("good.onnx"), "large/model.onnx", save_as_external_data=True, location="model.data", size_threshold=0
    )
    shutil.copy("large/model.onnx", "model.onnx")
    command = "build model.onnx --engine onnxruntime -o a.engine"

    user.refused(command)
    shutil.copy("large/model.data", "model.data")
    user.runs(command)


ENGINE = "build good.onnx --engine onnxruntime --no-cache -o a.engine"


@pytest.mark.advice("core/manifest.py:read_manifest", "copy both files together, or make the artifact again")
def test_a_manifest_that_is_lost(user: User) -> None:
    user.runs(ENGINE)
    Path("elsewhere").mkdir()
    shutil.copy("a.engine", "elsewhere")

    user.refused("verify elsewhere/a.engine --against good.pt --images photo.png")
    shutil.copy("a.engine.json", "elsewhere")
    user.runs("upscale elsewhere/a.engine photo.png -o out.png")
    user.runs(f"{ENGINE} --force")


@pytest.mark.advice("core/manifest.py:check_sha256", "copy both again, or make them again")
def test_an_artifact_that_was_changed(user: User) -> None:
    user.runs(ENGINE)
    intact = Path("a.engine").read_bytes()
    Path("a.engine").write_bytes(intact[:-1] + b"x")

    user.refused("upscale a.engine photo.png -o out.png")
    Path("a.engine").write_bytes(intact)
    user.runs("upscale a.engine photo.png -o out.png")


@pytest.mark.advice("core/manifest.py:Manifest.from_json", "make the artifact again with this version of srdeploy")
def test_an_artifact_of_another_version(user: User) -> None:
    user.runs(ENGINE)
    manifest = json.loads(Path("a.engine.json").read_text())
    Path("a.engine.json").write_text(json.dumps(manifest | {"schema": 999}))

    user.refused("upscale a.engine photo.png -o out.png")
    user.runs(f"{ENGINE} --force")
    user.runs("upscale a.engine photo.png -o out.png")


# ----------------------------------------------------------------------------------------------------------------------
# Packages

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.advice("core/errors.py:MissingExtraError.__init__", "install it with: pip install 'srdeploy[")
@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        ("openvino", "openvino", "build good.onnx --engine openvino -o a.engine"),
        ("onnxruntime", "onnxruntime", "build good.onnx --engine onnxruntime -o a.engine"),
        ("av", "av", "upscale good.onnx a.mp4 -o b.mp4"),
        ("jinja2", "jinja2", f"{VERIFY} --report page"),
        ("skimage", "scikit-image", "verify good.onnx --against good.pt --hr photos"),
    ],
)
def test_a_package_that_is_missing(
    user: User, monkeypatch: pytest.MonkeyPatch, module: str, package: str, command: str
) -> None:
    """tests/test_extras.py runs pip on every extra that a message names."""
    if command.startswith("upscale"):
        Path("a.mp4").write_bytes(bytes.fromhex("0000001c667479706d703432") + bytes(99))
    monkeypatch.setitem(sys.modules, module, None)

    message = user.refused(command)

    extra = re.search(r"pip install 'srdeploy\[([a-z-]+)\]'", message)
    assert extra is not None
    assert package in {re.split(r"[\[<>=]", entry)[0] for entry in EXTRAS[extra[1]]}
