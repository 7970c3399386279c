"""Which output each picture of a folder becomes."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from srdeploy.core.errors import SrdeployError, UsageError
from srdeploy.core.imaging.files import find_images
from srdeploy.upscale.image_writer import FORMATS
from srdeploy.upscale.scale.shards import Shard


@dataclass(frozen=True)
class Target:
    """A picture and its output, both relative to their folders, with forward slashes."""

    source: str
    output: str


@dataclass(frozen=True)
class Targets:
    """The pictures of a folder, or of one shard of it.

    Attributes:
        total: number of pictures in the whole folder.
        items: the pictures, in order.
        collisions: an error for each picture whose output another one already has, or cannot be named.
    """

    total: int
    items: list[Target] = field(default_factory=list)
    collisions: dict[str, SrdeployError] = field(default_factory=dict)


def find_targets(source: Path, output: Path, suffix: str | None, shard: Shard | None = None) -> Targets:
    """Find the pictures of a folder and their outputs.

    A suffix that can be written is kept as it is, also `P.JPG` next to `P.jpg`.

    Args:
        source: folder of images.
        output: folder of the results.
        suffix: of all outputs (".png"); None keeps each input's, or .png if it cannot be written.
        shard: the part to return; None for all.

    Raises:
        InputError: there is no image.
    """
    images = find_images(source)
    found = Targets(len(images))
    origins: dict[str, str] = {}
    for path in images:
        name = path.relative_to(source)
        kept = path.suffix if path.suffix.lower() in FORMATS else ".png"
        target = Target(name.as_posix(), name.with_suffix(suffix or kept).as_posix())
        made = Path(target.output).name
        if len(os.fsencode(made)) > 255:
            found.collisions[target.source] = UsageError(
                f"{path} would become {made[:40]}…, which is longer than the 255 bytes of a file name",
                next_step="rename it",
            )
            continue
        first = origins.setdefault(target.output, target.source)
        if shard is not None and not shard.holds(target.source):
            continue
        if first != target.source:
            found.collisions[target.source] = UsageError(
                f"{path} and {source / first} would both become {output / target.output}",
                next_step="rename one of them",
            )
        else:
            found.items.append(target)
    return found
