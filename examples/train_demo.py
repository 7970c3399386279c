"""Train the two demo networks from public-domain and CC0 photographs, cut the demo photographs, and score the result.

The photographs come from inside the scikit-image wheel, so nothing is downloaded. Each network sees only the part of
them named in `TRAINING`; the evaluation photographs of the demo are cut from the rest (`EVALUATION`). Low-resolution
patches are made with the bicubic kernel that published results use (`srdeploy.core.imaging.resize`).

    python examples/train_demo.py train rcan_x2 -o examples/rcan_x2_demo.pt
    python examples/train_demo.py train srdensenet_x4 -o examples/srdensenet_x4_demo.pth
    python examples/train_demo.py photos -o examples/photos
    python examples/train_demo.py score examples/rcan_x2_demo.pt --images examples/photos/evaluation

The learning rate follows a half cosine over `--steps`, or over `--minutes` where that ends first, so a run that was cut
short by the clock is still a finished one. The step reached, the seed and the figures of the shipped files are in
examples/README.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from srdeploy.core.imaging.colour import y_from_rgb
from srdeploy.core.imaging.psnr import y_psnr_db
from srdeploy.core.imaging.resize import imresize
from srdeploy.models.networks.rcan import Rcan, RcanConfig
from srdeploy.models.networks.srdensenet import SrDenseNet, SrDenseNetConfig, srdensenet_all

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Cut:
    """A part of one of scikit-image's photographs: file name, box (None: all of it) and the sizes it is used at."""

    file: str
    box: Box | None = None
    sizes: tuple[float, ...] = (1.0, 0.75, 0.55)


TRAINING = (
    Cut("astronaut.png", (0, 0, 320, 512)),  # Eileen Collins; NASA, public domain
    Cut("coffee.png", (0, 0, 300, 400)),  # Rachel Michetti, CC0
    Cut("rocket.jpg"),  # SpaceX, public domain
    Cut("camera.png"),  # Lav Varshney, CC0
    Cut("hubble_deep_field.jpg", sizes=(0.75, 0.5)),  # NASA, public domain
    Cut("retina.jpg", sizes=(0.4,)),  # Mikael Häggström, CC0 (Wikimedia Commons)
    Cut("brick.png", sizes=(1.0, 0.6)),  # CC0Textures, CC0
    Cut("grass.png", sizes=(0.7, 0.5)),  # Linolafett, CC0
    Cut("gravel.png", sizes=(1.0, 0.6)),  # CC0Textures, CC0
    Cut("text.png"),  # public domain
)

EVALUATION = {
    "cat": Cut("chelsea.png"),  # Stefan van der Walt, CC0; not in the training set at all
    "coffee": Cut("coffee.png", (300, 0, 600, 400)),
    "shuttle": Cut("astronaut.png", (320, 0, 512, 320)),
}

CALIBRATION = {
    "astronaut": Cut("astronaut.png", (96, 0, 320, 224)),
    "cup": Cut("coffee.png", (60, 20, 300, 244)),
    "launch-pad": Cut("rocket.jpg", (160, 203, 448, 427)),
    "photographer": Cut("camera.png", (110, 60, 382, 284)),
    "galaxies": Cut("hubble_deep_field.jpg", (60, 60, 284, 284)),
    "gravel": Cut("gravel.png", (0, 0, 224, 224)),
}


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        scale: of the network.
        colours: "rgb" or "y".
        network: builds it, freshly initialised.
        public_keys: returns its weights under the keys of the public layout it is stored in.
        patch: LR pixels on each side of a training patch.
        batch: patches per step.
        learning_rate: at its peak, for Adam.
        seed: of the initial weights and of the order of patches.
        steps: optimiser steps.
    """

    scale: int
    colours: str
    network: Callable[[], nn.Module]
    public_keys: Callable[[nn.Module], dict[str, torch.Tensor]]
    patch: int
    batch: int
    learning_rate: float
    seed: int
    steps: int


def train(recipe: Recipe, output: Path, *, steps: int, minutes: float, save_every: float = 120.0) -> None:
    """Train one network and write its weights, every `save_every` seconds and at the end."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)  # so that the order of additions, and the result, does not depend on the machine
    network = recipe.network().train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch declares no such overload
    optimiser = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    batches = training_batches(recipe)
    started = saved = time.monotonic()
    step, done, loss_sum = 0, 0.0, 0.0
    while done < 1:
        for group in optimiser.param_groups:
            warm_up = min(1.0, (step + 1) / 100)
            group["lr"] = recipe.learning_rate * warm_up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        low, high = next(batches)
        loss = nn.functional.l1_loss(network(low), high)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        loss_sum += loss.item()
        now = time.monotonic()
        done = max(step / steps, (now - started) / (60 * minutes))
        if step % 100 == 0:
            print(f"step {step}  {now - started:.0f} s  done {done:.3f}  L1 {loss_sum / 100:.5f}", flush=True)
            loss_sum = 0.0
        if now - saved > save_every or done >= 1:
            save_weights(recipe.public_keys(network), output)
            saved = now
    print(json.dumps({"output": str(output), "steps": step, "seconds": round(now - started), "seed": recipe.seed}))


def save_weights(weights: dict[str, torch.Tensor], output: Path) -> None:
    """Write a bare state dict of contiguous float32 tensors, whole or not at all."""
    temporary = output.with_name(f".{output.name}")
    torch.save({name: value.detach().clone().float().contiguous() for name, value in weights.items()}, temporary)
    temporary.replace(output)


def training_batches(recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (low, high) batches without end: (B, C, p, p) and (B, C, scale p, scale p) float32 in [0, 1].

    Patches are flipped and turned; colour channels are shuffled, which replaces the colours that a handful of
    photographs lacks. Of three places drawn, the one with the most contrast is kept: much of these photographs is sky.
    """
    random = np.random.default_rng(recipe.seed)
    pairs = [pair for cut in TRAINING for pair in training_pairs(cut, recipe)]
    areas = np.array([low.shape[0] * low.shape[1] for low, _ in pairs], dtype=np.float64)
    while True:
        lows: list[NDArray[np.float32]] = []
        highs: list[NDArray[np.float32]] = []
        for _ in range(recipe.batch):
            low_image, high_image = pairs[random.choice(len(pairs), p=areas / areas.sum())]
            candidates = [patch_pair(low_image, high_image, recipe, random) for _ in range(3)]
            low, high = max(candidates, key=lambda pair: float(pair[0].std()))
            turns, flip = int(random.integers(4)), bool(random.integers(2))
            channels = random.permutation(low.shape[2])
            for patch, patches in ((low, lows), (high, highs)):
                patch = np.rot90(patch, turns)[:, :, channels]
                patches.append(patch[:, ::-1] if flip else patch)
        yield tensor_from_patches(lows), tensor_from_patches(highs)


def tensor_from_patches(patches: list[NDArray[np.float32]]) -> torch.Tensor:
    """Stack channels-last patches into (B, C, H, W)."""
    return torch.from_numpy(np.stack(patches).transpose(0, 3, 1, 2).copy())


def patch_pair(
    low: NDArray[np.float32], high: NDArray[np.float32], recipe: Recipe, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cut the same place out of both images of a pair."""
    size, scale = recipe.patch, recipe.scale
    top = int(random.integers(low.shape[0] - size + 1))
    left = int(random.integers(low.shape[1] - size + 1))
    high_patch = high[top * scale : (top + size) * scale, left * scale : (left + size) * scale]
    return low[top : top + size, left : left + size], high_patch


def training_pairs(cut: Cut, recipe: Recipe) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield a cut at each of its sizes as (low, high), channels last, float32 in [0, 1]."""
    photograph = photograph_of(cut)
    for size in cut.sizes:
        high = photograph if size == 1.0 else imresize(photograph, scale=size)
        high = crop_to_multiple(high, recipe.scale)
        low = imresize(high, scale=1 / recipe.scale)
        if min(low.shape[:2]) >= recipe.patch:
            yield network_pixels(low, recipe.colours), network_pixels(high, recipe.colours)


def network_pixels(rgb: Pixels, colours: str) -> NDArray[np.float32]:
    """RGB (H, W, 3) uint8 to what the network sees: RGB in [0, 1], or Y in (16..235)/255 as (H, W, 1)."""
    scaled = rgb.astype(np.float64) / 255
    return (scaled if colours == "rgb" else y_from_rgb(scaled)[..., None]).astype(np.float32)


def photograph_of(cut: Cut) -> Pixels:
    """Read a cut from the scikit-image wheel as (H, W, 3) uint8."""
    import skimage.data

    with Image.open(Path(skimage.data.__file__).parent / cut.file) as image:
        return np.asarray(image.convert("RGB").crop(cut.box or (0, 0, *image.size)))


def crop_to_multiple(image: Pixels, scale: int) -> Pixels:
    """Drop rows at the bottom and columns at the right until the scale divides both sides."""
    return image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]


def write_photographs(folder: Path) -> None:
    """Write the calibration and evaluation photographs as PNG."""
    for kind, cuts in (("calibration", CALIBRATION), ("evaluation", EVALUATION)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, cut in cuts.items():
            pixels = photograph_of(cut)
            grey = bool((pixels == pixels[..., :1]).all())
            path = folder / kind / f"{name}.png"
            Image.fromarray(pixels[..., 0] if grey else pixels).save(path, optimize=True)
            print(f"{path}  {pixels.shape[1]}x{pixels.shape[0]}  {path.stat().st_size / 1000:.0f} kB")


def score(checkpoint: Path, images: Path) -> dict[str, dict[str, float]]:
    """Return Y PSNR in dB of bicubic and of the network for each HR image of a folder, and their means.

    The protocol is that of published results: HR cropped to a multiple of the scale, LR by bicubic, output rounded to
    8 bits, Y in studio swing kept in floating point, `scale` pixels shaved from each side.
    """
    from srdeploy.models.checkpoint.load import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    scale, colours = loaded.spec.scale, loaded.spec.colours
    results: dict[str, dict[str, float]] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() not in (".png", ".bmp", ".jpg"):
            continue
        with Image.open(path) as image:
            high = crop_to_multiple(np.asarray(image.convert("RGB")), scale)
        low = imresize(high, scale=1 / scale)
        batch = torch.from_numpy(network_pixels(low, colours).transpose(2, 0, 1)[None].copy())
        with torch.inference_mode():
            output = loaded.reference(batch)[0].clamp(0, 1).mul(255).round().to(torch.uint8)
        restored = output.permute(1, 2, 0).numpy()
        restored = restored if colours == "rgb" else restored[..., 0]
        results[path.stem] = {
            "bicubic": y_psnr_db(imresize(low, scale=scale), high, shave=scale),
            "network": y_psnr_db(restored, high, shave=scale),
        }
    results["mean"] = {
        method: float(np.mean([entry[method] for entry in results.values()])) for method in ("bicubic", "network")
    }
    return results


def compact_rcan_x2() -> nn.Module:
    """RCAN x2 with 3 groups of 4 blocks, 32 features, gates of width 4: about 0.3 M values, RGB in 0..1."""
    return Rcan(
        RcanConfig(
            scale=2,
            groups=3,
            blocks=4,
            features=32,
            attention_width=4,
            upsampler=(2,),
            value_range=1.0,
            mean_shift="none",
        )
    )


def compact_srdensenet_x4() -> nn.Module:
    """SRDenseNet_All x4 with 5 blocks of 4 layers, growth 16, bottleneck 64: about 0.3 M values, one channel."""
    network = SrDenseNet(
        replace(srdensenet_all(scale=4), growth=16, layers=4, blocks=5, low_level=64, bottleneck=64, upsampled=64)
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # PyTorch's default start lets the signal fade through this many ReLUs.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return network


def official_rcan_keys(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return RCAN's weights under the keys of the authors' checkpoints."""
    config = network.config
    assert isinstance(config, RcanConfig)
    names = {"first": "head.0", "body_end": f"body.{config.groups}", "last": "tail.1"}
    for group in range(config.groups):
        names[f"groups.{group}.end"] = f"body.{group}.body.{config.blocks}"
        for block in range(config.blocks):
            ours, theirs = f"groups.{group}.blocks.{block}", f"body.{group}.body.{block}.body"
            names |= {f"{ours}.conv1": f"{theirs}.0", f"{ours}.conv2": f"{theirs}.2"}
            names |= {f"{ours}.gate.squeeze": f"{theirs}.3.conv_du.0", f"{ours}.gate.expand": f"{theirs}.3.conv_du.2"}
    names |= {f"upsampler.{step}.convolution": f"tail.0.{2 * step}" for step in range(len(config.upsampler))}
    return renamed_weights(network, names)


def yjn870_keys(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return SRDenseNet's weights under the keys of the most used public PyTorch implementation."""
    config = network.config
    assert isinstance(config, SrDenseNetConfig)
    names = {"first": "conv.conv", "bottleneck": "bottleneck.0", "last": "reconstruction"}
    for block in range(config.blocks):
        for layer in range(config.layers):
            names[f"blocks.{block}.layers.{layer}"] = f"dense_blocks.{block}.block.{layer}.conv"
    names |= {f"upsampler.{step}.convolution": f"deconv.{2 * step}" for step in range(len(config.deconvolutions))}
    return renamed_weights(network, names)


def renamed_weights(network: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Rename a state dict by module; every module with weights must be named."""
    renamed = {}
    for key, value in network.state_dict().items():
        module, _, tensor = key.rpartition(".")
        renamed[f"{names[module]}.{tensor}"] = value
    return renamed


RECIPES = {
    "rcan_x2": Recipe(
        scale=2,
        colours="rgb",
        network=compact_rcan_x2,
        public_keys=official_rcan_keys,
        patch=24,
        batch=12,
        learning_rate=1e-3,
        seed=20261,
        steps=7500,
    ),
    "srdensenet_x4": Recipe(
        scale=4,
        colours="y",
        network=compact_srdensenet_x4,
        public_keys=yjn870_keys,
        patch=20,
        batch=12,
        learning_rate=1e-3,
        seed=20264,
        steps=6000,
    ),
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train", help="train one network")
    training.add_argument("recipe", choices=sorted(RECIPES))
    training.add_argument("-o", "--output", type=Path, required=True)
    training.add_argument("--steps", type=int, help="optimiser steps (default: those of the recipe)")
    training.add_argument("--minutes", type=float, default=60.0, help="stop after this time at the latest")
    photos = verbs.add_parser("photos", help="write the demo photographs")
    photos.add_argument("-o", "--output", type=Path, required=True)
    scoring = verbs.add_parser("score", help="compare a checkpoint with bicubic on a folder of HR images")
    scoring.add_argument("checkpoint", type=Path)
    scoring.add_argument("--images", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "train":
        recipe = RECIPES[options.recipe]
        train(recipe, options.output, steps=options.steps or recipe.steps, minutes=options.minutes)
    elif options.verb == "photos":
        write_photographs(options.output)
    else:
        print(json.dumps(score(options.checkpoint, options.images), indent=2))


if __name__ == "__main__":
    main()
