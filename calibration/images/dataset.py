"""The calibration set: windows of real images, of which some are held out to evaluate graphs, and others to test one.

Every fourth image is held out and never calibrated with: searches compare graphs on these. Another fourth tests the
graph that a search has chosen: the best of many graphs looks better on the images that chose it than it is. The drop in
PSNR is measured with and without HR images: held-out images are shrunk by the network's scale and are the truth
themselves; without HR images that is one octave below the sizes that the network will see. Images are decoded one at a
time, twice: once to choose windows, once to cut them. Only the windows are kept, so memory depends neither on the size
nor on the number of the images.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from srdeploy.calibration.images.effort import WindowPlan, plan_windows
from srdeploy.calibration.images.sampling import Candidate, Crop, choose_crops, list_candidates, measure_coverage
from srdeploy.calibration.images.sources import Photo, PhotoSource
from srdeploy.core.artifact import atomic_file, sha256_of_bytes
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.imaging.read import network_input
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.memory import default_memory
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.samples import Sample

MIN_IMAGES = 3
MIN_PIXELS = 2 * 32 * 32
HELD_OUT_EVERY = 4
MAX_HELD_OUT = 8
MIN_FOR_TEST = 8
"""With fewer images all are needed to calibrate and to choose; none is kept to test the chosen graph."""
MIN_TRUTH_SIDE = 16
"""Pixels that a held-out image must have left on each side after shrinking."""
_BAND_ROWS = 256
"""Rows of an image that are looked at together: what is computed of a large image stays small."""


@dataclass(frozen=True)
class CalibrationSet:
    """Images that a graph is calibrated and evaluated with. Iterating yields the calibration batches.

    Attributes:
        samples: crops and whole images that ranges are taken from.
        held_out: images kept aside to measure the drop on: searches choose by them.
        test: images that nothing is chosen by, to measure the chosen graph on; empty with fewer than `MIN_FOR_TEST`.
        document: the contents of `set.json`: files with SHA-256, crop recipe, coverage, files that were skipped.
    """

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    document: dict[str, Any] = field(default_factory=dict)
    test: tuple[Sample, ...] = ()

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (sample.image for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sha256(self) -> str:
        """Identity of the set: of its document in canonical JSON."""
        return sha256_of_bytes(json.dumps(self.document, sort_keys=True).encode())

    @property
    def truth(self) -> Literal["hr", "shrunk"] | None:
        """What the drop is measured against: HR images, or the images themselves, shrunk to be inputs."""
        if all(sample.truth is None for sample in self.held_out):
            return None
        return "hr" if self.document.get("recipe", {}).get("hr", True) else "shrunk"

    @property
    def image_hashes(self) -> frozenset[str]:
        """SHA-256 of every file that ranges are taken from, to warn when an evaluation meets one of them."""
        return frozenset(entry["sha256"] for entry in self.document.get("files", ()) if entry["use"] == "calibration")

    def to_json(self) -> dict[str, Any]:
        """Return the document of `set.json`."""
        return dict(self.document)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write `set.json`."""
        with atomic_file(path, force=force) as temporary:
            temporary.write_text(json.dumps(self.document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_calibration_set(
    images: Path,
    *,
    contract: ModelContract,
    hr: bool = False,
    count: int | None = None,
    crop: int = 64,
    whole: int = 4,
    seed: int = 0,
    skip_bad: bool = False,
    memory_bytes: int | None = None,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Make a calibration set from real images.

    Args:
        images: folder, image, pattern, zip, list file or video.
        contract: of the network: scale, colors, minimum input size, cost and memory per pixel.
        hr: the images are high resolution; they are shrunk by the network's scale (MATLAB's bicubic) to be its input,
            and are themselves the truth that a drop in PSNR is measured against. Without it the images are inputs; only
            those held out are shrunk, as far as they are large enough.
        count: crops that ranges are taken from; None takes 64, fewer for networks of more than a million
            multiply-adds per pixel.
        crop: their height and width in LR pixels.
        whole: images taken whole in addition, since channel attention depends on the size of its input; of an image
            above the budget, the largest centered window that fits.
        seed: for the choice of crops.
        skip_bad: use the rest when some files cannot be used, instead of refusing.
        memory_bytes: budget of everything that is computed with this set; None takes half of the free memory.
        progress: where to report.

    Raises:
        InputError: no images, too few, unreadable, constant or random ones, or gray ones for a color network.
        UsageError: a count or size that makes no sense.
        CapabilityError: the memory does not suffice for one crop.
    """
    if (count is not None and count < 1) or crop < max(8, contract.min_size) or whole < 0:
        raise UsageError(
            f"{count} crops of {crop}x{crop} and {whole} whole images",
            expected=f"at least one crop, of at least {max(8, contract.min_size)} pixels",
        )
    memory_bytes = memory_bytes or default_memory()
    plan = plan_windows(contract, memory_bytes=memory_bytes, count=count, crop=crop, whole=whole)
    progress.note(plan.summary())
    bad: list[tuple[str, str]] = []
    source = PhotoSource(images)
    shrink = contract.scale if hr else 1
    surveyed = _survey(source, plan, shrink, crop, seed, bad, progress)
    _refuse_bad(images, bad, surveyed, skip_bad)
    if contract.colours == "rgb" and all(photo.gray for photo in surveyed):
        raise InputError(f"{images} holds only gray images", expected="color images for an RGB network")
    held_out, test = _split(len(surveyed))
    aside = [*held_out, *test]
    used = [index for index in range(len(surveyed)) if index not in aside]
    candidates = [candidate for index in used for candidate in surveyed[index].candidates_of(index)]
    crops = choose_crops(candidates, count=plan.count, seed=seed)
    crops += [_center_crop(index, surveyed[index].low_size, plan.whole_pixels, "whole") for index in used[:whole]]
    shrinks = {
        index: surveyed[index].truth_shrink(contract) if index in aside else shrink for index in range(len(surveyed))
    }
    evaluated = [
        _center_crop(index, surveyed[index].shrunk_size(shrinks[index], plan), plan.held_out_pixels, "judge")
        for index in aside
    ]
    total = sum(entry.height * entry.width for entry in crops)
    if total < MIN_PIXELS:
        raise InputError(f"{images} has {total} LR pixels to calibrate with", expected=f"at least {MIN_PIXELS}")
    windows = _cut(source, surveyed, plan, [*crops, *evaluated], shrinks, progress)
    roles = dict.fromkeys(held_out, "judging") | dict.fromkeys(test, "test")
    document = _document(
        images, source, surveyed, crops, evaluated, roles, bad, hr=hr, count=plan.count, crop=crop, seed=seed
    )
    document["coverage"] = measure_coverage(low for low, _ in windows[: len(crops)])
    samples = [
        Sample(
            surveyed[entry.image].name, network_input(low, contract.colours), high if shrinks[entry.image] > 1 else None
        )
        for entry, (low, high) in zip([*crops, *evaluated], windows, strict=True)
    ]
    return CalibrationSet(
        samples=tuple(replace(sample, truth=None) for sample in samples[: len(crops)]),
        held_out=tuple(samples[len(crops) : len(crops) + len(held_out)]),
        test=tuple(samples[len(crops) + len(held_out) :]),
        document=document,
    )


def _split(count: int) -> tuple[list[int], list[int]]:
    """Return which of so many images are held out to choose graphs, and which test the chosen one."""
    held_out = list(range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY))[:MAX_HELD_OUT] or [count - 1]
    return held_out, list(range(1, count, HELD_OUT_EVERY))[:MAX_HELD_OUT] if count >= MIN_FOR_TEST else []


@dataclass(frozen=True)
class _Surveyed:
    """What is remembered of an image between the two passes.

    Attributes:
        name: as in `Photo`.
        sha256: as in `Photo`.
        size: (height, width) of the file.
        window: of the file, that is used: (top, left, height, width).
        low_size: (height, width) of the LR image made from the window.
        gray: all three channels are equal.
        cut: the window is not the whole image.
        candidates: windows of the LR image.
    """

    name: str
    sha256: str
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    low_size: tuple[int, int]
    gray: bool
    cut: bool
    candidates: tuple[Candidate, ...]

    def truth_shrink(self, contract: ModelContract) -> int:
        """Return by which factor a held-out image is shrunk, so that it is itself the truth; 1 if it is too small."""
        return contract.scale if min(self.size) // contract.scale >= max(MIN_TRUTH_SIDE, contract.min_size) else 1

    def shrunk_size(self, shrink: int, plan: WindowPlan) -> tuple[int, int]:
        """Return (height, width) of the image's window after shrinking."""
        _, _, height, width = plan.image_window(*self.size, shrink)
        return height // shrink, width // shrink

    def candidates_of(self, index: int) -> list[Candidate]:
        """Return the candidates as windows of image `index`."""
        return [replace(entry, crop=replace(entry.crop, image=index)) for entry in self.candidates]


def _survey(
    source: PhotoSource,
    plan: WindowPlan,
    shrink: int,
    crop: int,
    seed: int,
    bad: list[tuple[str, str]],
    progress: Progress,
) -> list[_Surveyed]:
    """Look at every image once; return them in an order that depends on contents alone."""
    surveyed: dict[str, _Surveyed] = {}
    with progress.task("reading images", total=min(source.found, source.limit)) as advance:
        for photo in source.photos(bad=bad):
            advance(note=photo.name)
            reason = _rejection_reason(photo.pixels)
            if reason:
                bad.append((photo.name, reason))
            elif photo.sha256 not in surveyed:  # the same picture twice is one picture
                surveyed[photo.sha256] = _survey_photo(photo, plan, shrink, crop, seed)
    return sorted(surveyed.values(), key=lambda entry: entry.sha256)


def _survey_photo(photo: Photo, plan: WindowPlan, shrink: int, crop: int, seed: int) -> _Surveyed:
    height, width = photo.pixels.shape[:2]
    window = plan.image_window(height, width, shrink)
    low = _low_resolution(photo.pixels, window, shrink)
    return _Surveyed(
        name=photo.name,
        sha256=photo.sha256,
        size=(height, width),
        window=window,
        low_size=low.shape[:2],
        gray=_is_gray(photo.pixels),
        cut=window[2:] != (height - height % shrink, width - width % shrink),
        candidates=tuple(list_candidates(low, size=crop, seed=(seed, int(photo.sha256[:8], 16)))),
    )


def _cut(
    source: PhotoSource,
    surveyed: Sequence[_Surveyed],
    plan: WindowPlan,
    crops: Sequence[Crop],
    shrinks: Mapping[int, int],
    progress: Progress,
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Decode the images that crops are taken from again; return the LR and HR pixels of each crop."""
    needed: Collection[str] = {surveyed[crop.image].sha256 for crop in crops}
    found: dict[Crop, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    indices = {entry.sha256: index for index, entry in enumerate(surveyed)}
    with progress.task("cutting windows", total=len(needed)) as advance:
        for photo in source.photos(bad=[], only=needed):
            index = indices[photo.sha256]
            shrink = shrinks[index]
            window = plan.image_window(*surveyed[index].size, shrink)
            top, left = window[:2]
            low = _low_resolution(photo.pixels, window, shrink)
            for crop in (entry for entry in crops if entry.image == index):
                high = Crop(
                    index,
                    top + crop.top * shrink,
                    left + crop.left * shrink,
                    crop.height * shrink,
                    crop.width * shrink,
                    "",
                )
                found[crop] = crop.cut(low).copy(), high.cut(photo.pixels).copy()
            advance(note=photo.name)
    missing = next((surveyed[crop.image].name for crop in crops if crop not in found), None)
    if missing is not None:
        raise InputError(f"{missing} changed while it was read", next_step="run the command again")
    return [found[crop] for crop in crops]


def _refuse_bad(images: Path, bad: Sequence[tuple[str, str]], surveyed: Sequence[_Surveyed], skip_bad: bool) -> None:
    if bad and not skip_bad:
        name, reason = bad[0]
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f"{len(bad)} of {len(bad) + len(surveyed)} images cannot be used: {name} ({reason}){others}",
            expected="real images",
            next_step="remove them; quantize and compress use the rest with --skip-bad",
        )
    if len(surveyed) < MIN_IMAGES:
        raise InputError(
            f"{images} has {len(surveyed)} usable images",
            expected=f"at least {MIN_IMAGES} different ones (50 or more give better ranges)",
        )


def _rejection_reason(pixels: NDArray[np.uint8]) -> str | None:
    """Return why an image says nothing about real activations, None if it looks like a picture."""
    height, width = pixels.shape[:2]
    if min(height, width) < 8:
        return f"{width}x{height} pixels are too few"
    mean = float(pixels.mean(dtype=np.float64))
    energy = along = down = 0.0
    for top in range(0, height, _BAND_ROWS):
        # One more row, so that neighbors across the bands count too.
        luma = pixels[top : top + _BAND_ROWS + 1].astype(np.float32).mean(axis=2) - np.float32(mean)
        own = luma[:_BAND_ROWS]
        energy += float((own**2).sum(dtype=np.float64))
        along += float((own[:, 1:] * own[:, :-1]).sum(dtype=np.float64))
        down += float((luma[1:] * luma[:-1]).sum(dtype=np.float64))
    energy /= height * width
    if energy < 1.0:
        return "it is constant"
    along, down = along / (height * (width - 1)) / energy, down / ((height - 1) * width) / energy
    # Neighboring pixels of photographs, drawings and text correlate (0.8 and more); those of white noise do not.
    return "it is random noise" if max(along, down) < 0.2 else None


def _is_gray(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())


def _low_resolution(pixels: NDArray[np.uint8], window: tuple[int, int, int, int], shrink: int) -> NDArray[np.uint8]:
    """Return the LR image of a window (top, left, height, width) of a photo."""
    top, left, height, width = window
    inside = pixels[top : top + height, left : left + width]
    return imresize(inside, scale=1 / shrink) if shrink > 1 else inside


def _center_crop(index: int, size: tuple[int, int], max_pixels: int, reason: str) -> Crop:
    height, width = size
    shrink = min(1.0, (max_pixels / (height * width)) ** 0.5)
    tall, wide = min(height, max(8, int(height * shrink))), min(width, max(8, int(width * shrink)))
    return Crop(index, (height - tall) // 2, (width - wide) // 2, tall, wide, reason)


def _document(
    images: Path,
    source: PhotoSource,
    surveyed: Sequence[_Surveyed],
    crops: Sequence[Crop],
    evaluated: Sequence[Crop],
    roles: Mapping[int, str],
    bad: Sequence[tuple[str, str]],
    **recipe: Any,
) -> dict[str, Any]:
    files = []
    for index, photo in enumerate(surveyed):
        height, width = photo.size
        entry = {"name": photo.name, "sha256": photo.sha256, "height": height, "width": width}
        entry["use"] = roles.get(index, "calibration")
        if photo.cut:
            entry["window"] = list(photo.window)
        files.append(entry)
    document = {
        "schema": 1,
        "source": images.name,
        "recipe": recipe,
        "files": files,
        "passed_over": [{"name": name, "reason": reason} for name, reason in bad],
        "crops": [{**asdict(crop), "image": surveyed[crop.image].name} for crop in crops],
        "judges": [{**asdict(crop), "image": surveyed[crop.image].name} for crop in evaluated],
        "lr_pixels": sum(crop.height * crop.width for crop in crops),
    }
    if source.found > source.limit:
        document["files_found"] = source.found
    return document
