"""Calibration sets: what is taken, in which order, and what is refused."""

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.calibration.images.effort import RANGE_MACS, plan_windows
from srdeploy.calibration.images.sampling import Candidate, choose_crops, list_candidates
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError, InputError, UsageError
from srdeploy.core.imaging.resize import imresize

Paint = Callable[..., np.ndarray]
Contracts = dict[str, ModelContract]


def test_the_same_images_give_the_same_set_whatever_they_are_called(
    photos: Path, contracts: Contracts, tmp_path: Path
) -> None:
    for index, path in enumerate(sorted(photos.iterdir())):
        (tmp_path / f"{9 - index}.png").write_bytes(path.read_bytes())

    one = make_calibration_set(photos, contract=contracts["residual"], count=14, crop=16, whole=1)
    two = make_calibration_set(tmp_path, contract=contracts["residual"], count=14, crop=16, whole=1)
    other = make_calibration_set(photos, contract=contracts["residual"], count=14, crop=16, whole=1, seed=1)

    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_judges_are_never_calibrated_on(calibrations: dict[str, CalibrationSet]) -> None:
    document = calibrations["residual"].document

    used = {crop["image"] for crop in document["crops"]}
    judged = {crop["image"] for crop in document["judges"]}

    assert used
    assert judged
    assert not used & judged
    assert len(calibrations["residual"].image_hashes) == len(used)


def test_hr_images_are_shrunk_as_benchmarks_do_and_kept_as_truth(
    photos: Path, contracts: Contracts, calibrations: dict[str, CalibrationSet]
) -> None:
    judge = calibrations["residual"].held_out[0]
    high = np.asarray(Image.open(photos / judge.name))
    low = imresize(high, scale=0.5)

    found = judge.image[0].transpose(1, 2, 0) * 255

    assert judge.truth is not None
    assert judge.truth.shape[0] == 2 * judge.image.shape[2]
    height, width = found.shape[:2]
    top, left = (low.shape[0] - height) // 2, (low.shape[1] - width) // 2
    assert np.array_equal(np.rint(found).astype(np.uint8), low[top : top + height, left : left + width])


def test_without_hr_held_out_images_are_their_own_truth_one_octave_down(
    photos: Path, paint: Paint, contracts: Contracts, tmp_path: Path
) -> None:
    inputs = make_calibration_set(photos, contract=contracts["residual"], count=8, crop=16, whole=1)
    hr = make_calibration_set(photos, contract=contracts["residual"], hr=True, count=8, crop=16, whole=1)
    for seed in range(4):
        Image.fromarray(paint(seed, 31, 40)).save(tmp_path / f"{seed}.png")
    tiny = make_calibration_set(tmp_path, contract=contracts["residual"], count=4, crop=16)

    whole, shrunk, held_out = inputs.samples[-1].image, hr.samples[-1].image, inputs.held_out[0]
    assert whole.shape[2] == 2 * shrunk.shape[2]  # ranges come from the images as they are
    assert held_out.truth is not None
    assert np.array_equal(held_out.image, hr.held_out[0].image)
    assert (inputs.truth, hr.truth) == ("shrunk", "hr")
    assert tiny.truth is None  # 15 rows are too few to say anything


def test_a_luma_network_gets_one_channel(calibrations: dict[str, CalibrationSet]) -> None:
    batch = next(iter(calibrations["dense"]))

    assert batch.shape[:2] == (1, 1)
    assert batch.dtype == np.float32
    assert batch.min() >= 16 / 255 - 1e-6
    assert batch.max() <= 235 / 255 + 1e-6


def candidates_of(images: list[np.ndarray]) -> list[Candidate]:
    return [
        replace(entry, crop=replace(entry.crop, image=index))
        for index, pixels in enumerate(images)
        for entry in list_candidates(pixels, size=16, seed=(index,))
    ]


def test_the_one_saturated_corner_is_always_taken(paint: Paint) -> None:
    images = [np.full((64, 64, 3), 90, np.uint8) + paint(seed, 64, 64) // 8 for seed in range(4)]
    images[2][40:48, 8:16] = (255, 0, 0)

    crops = choose_crops(candidates_of(images), count=8, seed=0)

    red = [crop for crop in crops if (crop.cut(images[crop.image]) == (255, 0, 0)).all(axis=2).any()]
    assert red
    assert "extreme" in red[0].reason


def test_crops_are_distinct_and_inside(paint: Paint) -> None:
    images = [paint(seed, 40, 56) for seed in range(3)]

    crops = choose_crops(candidates_of(images), count=40, seed=3)

    assert len({(crop.image, crop.top, crop.left) for crop in crops}) == len(crops)
    assert all(crop.cut(images[crop.image]).shape == (16, 16, 3) for crop in crops)


def test_zip_list_and_pattern_hold_the_same_images(photos: Path, contracts: Contracts, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.iterdir():
            archive.write(path, f"some folder/{path.name}")
    listing = tmp_path / "photos.txt"
    listing.write_text("# chosen\n" + "\n".join(str(path) for path in photos.iterdir()))

    sets = [
        make_calibration_set(source, contract=contracts["residual"], count=4, crop=16)
        for source in (photos, tmp_path / "photos.zip", listing, photos / "*.png")
    ]

    hashes = [sorted(entry["sha256"] for entry in made.document["files"]) for made in sets]
    assert all(entry == hashes[0] for entry in hashes)


def test_a_video_gives_frames_over_its_whole_length(paint: Paint, contracts: Contracts, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(9):
            for packet in stream.encode(av.VideoFrame.from_ndarray(paint(seed), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)

    made = make_calibration_set(tmp_path / "clip.mp4", contract=contracts["residual"], count=4, crop=16)

    names = {entry["name"] for entry in made.document["files"]}
    assert names == {f"clip.mp4 frame {index}" for index in range(9)}


@pytest.mark.parametrize(
    "name", [pytest.param("*.tiff", id="pattern without a match"), pytest.param("empty.txt", id="empty list"),
             pytest.param("empty.zip", id="zip without images"), pytest.param("torn.zip", id="no zip at all"),
             pytest.param("torn.mp4", id="no video at all")],
)  # fmt: skip
def test_sources_without_images_are_refused(name: str, contracts: Contracts, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing")
    (tmp_path / "torn.zip").write_bytes(b"PK nothing")
    (tmp_path / "torn.mp4").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.md", "no images here")

    with pytest.raises(InputError) as caught:
        make_calibration_set(tmp_path / name, contract=contracts["residual"])

    assert "\n" not in str(caught.value)


def test_set_json_says_what_was_taken(calibrations: dict[str, CalibrationSet], tmp_path: Path) -> None:
    calibrations["residual"].save(tmp_path / "set.json")

    document = json.loads((tmp_path / "set.json").read_text())

    assert document["recipe"]["crop"] == 16
    assert len(document["files"]) == 6
    assert document["coverage"]["white"] > 0.5
    assert all(len(entry["sha256"]) == 64 for entry in document["files"])


def _constant(folder: Path, paint: Paint) -> None:
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "flat.png")


def _noise(folder: Path, paint: Paint) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / "noise.png")


def _broken(folder: Path, paint: Paint) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        pytest.param(_constant, "constant", id="constant"),
        pytest.param(_noise, "noise", id="random"),
        pytest.param(_broken, "broken.png", id="undecodable"),
    ],
)
def test_useless_images_are_named_and_only_passed_over_when_asked(
    spoil: Callable[[Path, Paint], None], word: str, paint: Paint, contracts: Contracts, tmp_path: Path
) -> None:
    for seed in range(4):
        Image.fromarray(paint(seed)).save(tmp_path / f"{seed}.png")
    spoil(tmp_path, paint)

    with pytest.raises(InputError, match=word) as caught:
        make_calibration_set(tmp_path, contract=contracts["residual"], count=4, crop=16)
    made = make_calibration_set(tmp_path, contract=contracts["residual"], count=4, crop=16, skip_bad=True)

    assert "1 of 5" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(made.document["passed_over"]) == 1


def test_too_few_gray_or_no_images_are_refused(paint: Paint, contracts: Contracts, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        make_calibration_set(tmp_path, contract=contracts["residual"])
    Image.fromarray(paint(0)).save(tmp_path / "0.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(InputError, match="1 usable"):  # the same picture twice is one picture
        make_calibration_set(tmp_path, contract=contracts["residual"])
    for seed in range(4):
        Image.fromarray(paint(seed)).convert("L").save(tmp_path / f"{seed}.png")
    (tmp_path / "copy.png").unlink()
    with pytest.raises(InputError, match="gray"):
        make_calibration_set(tmp_path, contract=contracts["residual"], count=4, crop=16)
    assert make_calibration_set(tmp_path, contract=contracts["dense"], count=4, crop=16)


def test_a_crop_smaller_than_sense_is_a_usage_error(photos: Path, contracts: Contracts) -> None:
    with pytest.raises(UsageError):
        make_calibration_set(photos, contract=contracts["residual"], crop=4)


def peak_bytes(folder: Path, contract: ModelContract) -> int:
    tracemalloc.start()
    try:
        make_calibration_set(folder, contract=contract, count=4, crop=100, whole=1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_pictures(paint: Paint, contracts: Contracts, tmp_path: Path) -> None:
    pictures = {"few": 32, "many": 64}  # eight are held out of both
    for name, count in pictures.items():
        (tmp_path / name).mkdir()
        for seed in range(count):
            Image.fromarray(paint(seed, 200, 200)).save(tmp_path / name / f"{seed}.png")
    peak_bytes(tmp_path / "few", contracts["residual"])  # imports and caches

    few, many = (peak_bytes(tmp_path / name, contracts["residual"]) for name in pictures)

    # 32 more decoded pictures would be 3.8 MB; what is remembered of each is some kilobytes.
    assert many < few + 1_000_000


def test_windows_do_not_grow_with_the_pictures(paint: Paint, contracts: Contracts, tmp_path: Path) -> None:
    for seed in range(4):
        Image.fromarray(paint(seed, 700, 900)).save(tmp_path / f"{seed}.png")

    made = make_calibration_set(tmp_path, contract=contracts["residual"], count=4, crop=16, whole=1)

    windows = [sample.image.shape[2:] for sample in (*made.samples[4:], *made.held_out)]
    assert windows[0][0] * windows[0][1] <= 256 * 256
    assert all(height * width <= 160 * 160 for height, width in windows[1:])
    assert all(abs(width / height - 9 / 7) < 0.03 for height, width in windows)  # the middle, in the picture's shape


def test_an_expensive_network_sees_fewer_pixels(contracts: Contracts) -> None:
    small = replace(contracts["residual"], macs_per_pixel=0.3e6)
    full = replace(contracts["residual"], macs_per_pixel=16e6, largest_tensor_per_pixel=1024)

    asked = {"memory_bytes": 8 << 30, "crop": 64, "whole": 4}
    plain, limited = plan_windows(small, count=None, **asked), plan_windows(full, count=None, **asked)

    assert (plain.count, plain.whole_pixels, plain.held_out_pixels) == (64, 256**2, 160**2)
    assert limited.limited
    pixels = limited.count * 64 * 64 + 4 * limited.whole_pixels
    assert pixels * 16e6 <= 2 * RANGE_MACS
    assert plan_windows(full, count=50, **asked).count == 50  # a number that the user gives is kept


def test_a_small_budget_cuts_windows_and_a_smaller_one_is_refused(contracts: Contracts) -> None:
    contract = replace(contracts["residual"], macs_per_pixel=16e6, largest_tensor_per_pixel=1024)

    plan = plan_windows(contract, memory_bytes=1 << 30, count=None, crop=32, whole=0)

    assert 32 * 32 <= plan.whole_pixels < 128 * 128
    with pytest.raises(CapabilityError) as caught:
        plan_windows(contract, memory_bytes=600 << 20, count=None, crop=32, whole=0)
    assert "--memory" in str(caught.value)
    assert "at least 9" in str(caught.value)  # 900 and some MiB


def test_of_a_picture_above_the_budget_the_middle_is_used(contracts: Contracts) -> None:
    plan = plan_windows(contracts["residual"], memory_bytes=1 << 30, count=None, crop=16, whole=1)

    top, left, height, width = plan.image_window(6000, 4001, 2)

    assert height * width <= plan.image_pixels < 6000 * 4001
    assert all(number % 2 == 0 for number in (top, left, height, width))
    assert abs(top + height / 2 - 3000) <= 2
    assert plan.image_window(99, 101, 2) == (0, 0, 98, 100)


def test_with_enough_images_some_choose_nothing(
    contracts: dict[str, ModelContract], paint: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    for seed in range(9):
        Image.fromarray(paint(seed)).save(tmp_path / f"{seed}.png")

    made = make_calibration_set(tmp_path, contract=contracts["dense"], hr=True, count=8, crop=16, whole=1)

    uses = [entry["use"] for entry in made.document["files"]]
    assert (uses.count("calibration"), uses.count("judging"), uses.count("test")) == (5, 2, 2)
    calibrated, chosen, tested = ({sample.name for sample in part} for part in (made.samples, made.held_out, made.test))
    assert len(tested) == 2
    assert calibrated.isdisjoint(chosen | tested)
    assert chosen.isdisjoint(tested)
    assert all(sample.truth is not None for sample in made.test)


def test_few_images_are_all_needed_to_calibrate_and_choose(calibrations: dict[str, CalibrationSet]) -> None:
    assert calibrations["dense"].test == ()
