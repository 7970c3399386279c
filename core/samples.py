"""Images that graphs and engines are calibrated with and evaluated on: the network's input and, if given, its truth."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.imaging.files import find_images
from srdeploy.core.imaging.psnr import crop_to_multiple
from srdeploy.core.imaging.read import network_input, rgb8
from srdeploy.core.imaging.resize import imresize


@dataclass(frozen=True, eq=False)
class Sample:
    """One image.

    Attributes:
        name: of the file it was taken from, for tables and file names.
        image: (1, C, H, W) float32 in [0, 1], the network's input.
        truth: (H', W', 3) uint8 RGB ground truth, or (H', W') luma, of the network's output size or a few pixels
            larger; None without ground truth.
    """

    name: str
    image: NDArray[np.float32]
    truth: NDArray[np.uint8] | None = None


class SampleFolder(Sequence[Sample]):
    """Low-resolution images of a folder, decoded one at a time, each with its ground truth if there is one.

    With only ground truth given, the low-resolution images are made from it by MATLAB's bicubic, as those of the
    public benchmarks are. Verification crops what is larger than an engine's profile.

    Args:
        images: a folder (searched with everything below it) or one file; None to shrink the ground truth.
        truth: a folder or file of ground truth; None for none.
        contract: of the network: scale and colors.
        limit: use at most this many images, spread evenly over the sorted names; None for all.
        max_side: crop to at most this many low-resolution pixels per axis; None for whole images.

    Raises:
        UsageError: neither images nor truth.
        InputError: a folder holds no image, or an image has no ground truth, or several candidates for it.
    """

    def __init__(
        self,
        images: Path | None,
        truth: Path | None,
        *,
        contract: ModelContract,
        limit: int | None = None,
        max_side: int | None = None,
    ) -> None:
        if images is None and truth is None:
            raise UsageError("no images given", next_step="name a folder with --images, --hr or both")
        self._contract = contract
        self._max_side = max_side
        pairs: list[tuple[Path | None, Path | None]]
        if images is None:
            assert truth is not None
            pairs = [(None, path) for path in find_images(truth)]
        elif truth is None:
            pairs = [(path, None) for path in find_images(images)]
        else:
            pairs = _paired(find_images(images), find_images(truth))
        if limit is not None and len(pairs) > limit:
            pairs = [pairs[index * len(pairs) // limit] for index in range(limit)]
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """Decode one sample, or a list of them."""
        if isinstance(index, slice):
            return [self[entry] for entry in range(*index.indices(len(self)))]
        return self._load(*self._pairs[index])

    def __iter__(self) -> Iterator[Sample]:
        for low, high in self._pairs:
            yield self._load(low, high)

    def _load(self, low: Path | None, high: Path | None) -> Sample:
        scale = self._contract.scale
        truth = None if high is None else rgb8(high)
        if low is not None:
            pixels = rgb8(low)
        else:
            assert truth is not None
            truth = crop_to_multiple(truth, scale)
            if 0 in truth.shape:
                raise InputError(f"{high} is smaller than {scale}x{scale} pixels", expected="a larger ground truth")
            pixels = imresize(truth, scale=1 / scale)
        path = low or high
        assert path is not None
        if truth is not None and min(np.subtract(truth.shape[:2], np.multiply(pixels.shape[:2], scale))) < 0:
            raise InputError(
                f"ground truth {high} has {truth.shape[1]}x{truth.shape[0]} pixels for a {pixels.shape[1]}x"
                f"{pixels.shape[0]} image",
                expected=f"at least {scale} times its size",
            )
        pixels, truth = self._cropped(pixels, truth)
        return Sample(path.stem, network_input(pixels, self._contract.colours), truth)

    def _cropped(
        self, pixels: NDArray[np.uint8], truth: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        height, width = (int(min(side, self._max_side or math.inf)) for side in pixels.shape[:2])
        scale = self._contract.scale
        return pixels[:height, :width], None if truth is None else truth[: height * scale, : width * scale]


def windows_of(samples: Sequence[Sample], count: int, side: int = 64) -> list[Sample]:
    """Return a few samples, evenly over a set, each cut to its top left `side` pixels and without its truth."""
    step = max(1, len(samples) // count)
    return [Sample(sample.name, sample.image[:, :, :side, :side]) for sample in samples[::step][:count]]


def _paired(images: Sequence[Path], truths: Sequence[Path]) -> list[tuple[Path | None, Path | None]]:
    """Match by name: the same stem, or a stem followed by something that is no letter or digit (baby_LRBI_x2)."""
    stems: dict[str, list[Path]] = {}
    for path in truths:
        stems.setdefault(path.stem, []).append(path)
    pairs: list[tuple[Path | None, Path | None]] = []
    for image in images:
        fitting = [stem for stem in stems if _belongs(image.stem, stem)]
        best = max(fitting, key=len, default=None)
        if best is None:
            raise InputError(
                f"{image} has no ground truth",
                expected=f"a file named {image.stem}.* among the {len(truths)} given with --hr",
            )
        if len(stems[best]) > 1:
            raise InputError(f"{image} has several ground truths: {', '.join(str(path) for path in stems[best])}")
        pairs.append((image, stems[best][0]))
    return pairs


def _belongs(image: str, truth: str) -> bool:
    return image == truth or (image.startswith(truth) and not image[len(truth)].isalnum())
