"""Windows: even, of one shape, overlapping enough; stitched pictures; the seam score."""

import numpy as np
import pytest

from srdeploy.core.errors import UsageError
from srdeploy.upscale.tiles import plan_tiles, seam_score, stitch


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 7, 33, 64, 100, 101, 997])
@pytest.mark.parametrize(("window", "halo"), [(33, 4), (64, 16), (64, 0)])
def test_windows_cover_the_image_and_overlap_by_two_halos(size: int, window: int, halo: int, multiple: int) -> None:
    axis = plan_tiles(size, 1, window=(window, 1), halo=halo, multiple=multiple).rows

    ends = [start + axis.window for start in axis.starts]
    assert axis.window <= window
    assert axis.starts[0] == 0
    assert ends[-1] == size + axis.padding
    assert axis.padding < multiple
    assert all(start % multiple == 0 for start in axis.starts)
    assert all(
        left + axis.window - right >= 2 * halo for left, right in zip(axis.starts[:-1], axis.starts[1:], strict=True)
    )


def test_windows_are_even() -> None:
    """Two thirds of a window left over make smaller windows, not one sliver."""
    axis = plan_tiles(100, 1, window=(60, 1), halo=4).rows

    assert axis.window == 54
    assert axis.starts == (0, 46)


def test_window_without_room_for_two_halos_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tiles of 32 pixels with an overlap of 16.*at least 33"):
        plan_tiles(100, 100, window=(32, 32), halo=16)


def _nearest(tiles: np.ndarray) -> np.ndarray:
    return tiles.repeat(2, axis=2).repeat(2, axis=3)


@pytest.mark.parametrize("blend", [0, 3, 8], ids=["cut", "odd crossfade", "crossfade"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (40, 3), (41, 67)])
def test_stitched_tiles_of_a_local_network_are_the_whole_image(shape: tuple[int, int], batch: int, blend: int) -> None:
    image = np.random.default_rng(0).random((2, 3, *shape), dtype=np.float32)
    plan = plan_tiles(*shape, window=(17, 19), halo=5, blend=blend)

    bands = list(stitch(plan, scale=2, trim=0, read_rows=lambda a, b: image[:, :, a:b], run=_nearest, batch=batch))

    # 1e-6: crossfade weights sum to one up to the rounding of FP32
    np.testing.assert_allclose(np.concatenate(bands, axis=2), _nearest(image), atol=1e-6)


def test_batches_are_filled_and_small_images_padded_for_engines_of_one_shape() -> None:
    seen = []

    def run(tiles: np.ndarray) -> np.ndarray:
        seen.append(tiles.shape)
        return _nearest(tiles)

    image = np.random.default_rng(0).random((1, 3, 5, 30), dtype=np.float32)
    plan = plan_tiles(5, 30, window=(16, 16), halo=2, fixed=True)
    bands = list(
        stitch(plan, scale=2, trim=0, read_rows=lambda a, b: image[:, :, a:b], run=run, batch=2, fill_batches=True)
    )

    assert set(seen) == {(2, 3, 16, 16)}
    np.testing.assert_array_equal(np.concatenate(bands, axis=2), _nearest(image))


def test_trimmed_output_loses_only_the_last_pixels() -> None:
    image = np.random.default_rng(0).random((1, 1, 30, 40), dtype=np.float32)
    plan = plan_tiles(30, 40, window=(16, 16), halo=3)

    bands = list(
        stitch(plan, scale=2, trim=1, read_rows=lambda a, b: image[:, :, a:b], run=lambda t: _nearest(t)[..., :-1, :-1])
    )

    np.testing.assert_array_equal(np.concatenate(bands, axis=2), _nearest(image)[..., :-1, :-1])


def test_seam_score_finds_a_grid_and_passes_a_smooth_picture() -> None:
    plan = plan_tiles(60, 60, window=(32, 32), halo=4)
    rows, columns = np.mgrid[0:120, 0:120] / 10.0
    smooth = (np.sin(rows) + np.cos(columns))[..., None]
    grid = smooth.copy()
    for seam in plan.rows.seams:
        grid[int(seam * 2) :] += 0.5  # brighter below each seam, as tiles with their own statistics are

    assert seam_score(smooth, plan, 2) == pytest.approx(1.0, abs=0.2)
    assert (seam_score(grid, plan, 2) or 0) > 1.5
    assert seam_score(smooth, plan_tiles(60, 60, window=(60, 60), halo=0), 2) is None
