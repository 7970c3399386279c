"""Upscale from Python, as thin as the command.

    python examples/upscale_api.py MODEL [PHOTO] [OUTPUT.png]

MODEL is an engine, an ONNX file or a bundle; PHOTO defaults to one of the demonstration photographs.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from srdeploy.core.imaging.read import rgb8
from srdeploy.upscale import TileSettings, Upscaler, write_image


def main(model: Path, photo: Path, output: Path) -> None:
    """Upscale one photograph as numpy bytes, as a torch tensor, and in tiles."""
    small = rgb8(photo)  # (H, W, 3) uint8; uint16 and float32 in 0..1 work alike, and so do gray and alpha
    with Upscaler.open(model) as up:
        large = up(small)  # the same type and kind, scale times as large
        print(f"{up.info.name}: {small.shape} -> {large.shape} {large.dtype}")

        planes = torch.from_numpy(small).permute(2, 0, 1).float() / 255  # (3, H, W) in 0..1
        print(f"torch: {tuple(up(planes).shape)}")

        # How a picture ran, and how a larger one would.
        _, report = up.upscale(small)
        print(report.decision.reason)
        print(up.decide(20_000, 20_000).reason)

    with Upscaler.open(model, TileSettings(side=128)) as up:
        tiled, report = up.upscale(small)
        difference = np.abs(tiled.astype(int) - large).max()
        print(f"{report.decision.reason}: at most {difference} of 255 from the whole image")
    write_image(output, large)
    print(f"wrote {output}")


if __name__ == "__main__":
    words = [Path(word) for word in sys.argv[1:]]
    if not words:
        sys.exit(__doc__)
    default = Path(__file__).parent / "photos" / "evaluation" / "coffee.png"
    main(words[0], words[1] if len(words) > 1 else default, words[2] if len(words) > 2 else Path("upscaled.png"))
