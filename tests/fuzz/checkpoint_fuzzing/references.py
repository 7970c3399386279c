"""Every dialect's source as plain functions over a dict of tensors, written from the sources' facts, in float64.

A tensor is made when its key is first asked for, so running a reference writes a checkpoint in its family's own key
layout; nothing of srdeploy takes part.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIV2K = torch.tensor([0.4488, 0.4371, 0.4040]).double().view(1, 3, 1, 1)


class Weights(dict[str, Tensor]):
    """Tensors by key, made on first use; stored as float32, used as float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, key: str, *shape: int, spread: float = 1.0, center: float = 0.0) -> Tensor:
        if key not in self:
            self[key] = torch.randn(*shape, generator=self.generator) * spread + center
        return self[key].double()

    def conv(self, key: str, maps: Tensor, outputs: int, kernel: int = 3, bias: bool = True) -> Tensor:
        fan_in = maps.shape[1] * kernel**2
        weight = self.take(f"{key}.weight", outputs, maps.shape[1], kernel, kernel, spread=1.4 / math.sqrt(fan_in))
        shift = self.take(f"{key}.bias", outputs, spread=0.1) if bias else None
        return F.conv2d(maps, weight, shift, padding=kernel // 2)

    def deconv(self, key: str, maps: Tensor, outputs: int, kernel: int, bias: bool = True, **geometry: int) -> Tensor:
        spread = 1.4 / math.sqrt(maps.shape[1] * max(1, kernel**2 // geometry["stride"] ** 2))
        weight = self.take(f"{key}.weight", maps.shape[1], outputs, kernel, kernel, spread=spread)
        shift = self.take(f"{key}.bias", outputs, spread=0.1) if bias else None
        return F.conv_transpose2d(maps, weight, shift, **geometry)

    def norm(self, key: str, maps: Tensor) -> Tensor:
        size = maps.shape[1]
        mean = self.take(f"{key}.running_mean", size, spread=0.3)
        self.setdefault(f"{key}.running_var", torch.rand(size, generator=self.generator) + 0.5)
        self.setdefault(f"{key}.num_batches_tracked", torch.tensor(7))
        weight = self.take(f"{key}.weight", size, spread=0.3, center=1.0)
        bias = self.take(f"{key}.bias", size, spread=0.3)
        return F.batch_norm(maps, mean, self[f"{key}.running_var"].double(), weight, bias)

    def prelu(self, key: str, maps: Tensor) -> Tensor:
        return F.prelu(maps, self.take(f"{key}.weight", 1, spread=0.1, center=0.25))

    def shift(self, key: str, image: Tensor, size: float, sign: int) -> Tensor:
        channels = image.shape[1]
        if f"{key}.weight" not in self:
            drift = 0.01 * torch.randn(channels, channels, 1, 1, generator=self.generator)
            self[f"{key}.weight"] = torch.eye(channels).view(channels, channels, 1, 1) + drift
            self[f"{key}.bias"] = sign * 0.45 * size * (1 + 0.01 * torch.randn(channels, generator=self.generator))
        return F.conv2d(image, self[f"{key}.weight"].double(), self[f"{key}.bias"].double())


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky_relu": lambda maps: F.leaky_relu(maps, 0.2),
}


@dataclass
class Sizes:
    """Random sizes; the first five are RCAN's, then SRDenseNet's."""

    scale: int
    groups: int
    blocks: int
    features: int
    width: int
    channels: int
    growth: int
    layers: int
    low: int
    bottleneck: int


@dataclass
class Case:
    """A family: its reference, the scales it exists for, and what a user must state.

    `run` returns the output for 0..1 input as the family feeds it from the outside, on 0..1.
    """

    dialect: str
    run: Callable[[Weights, Tensor, Sizes], Tensor]
    scales: tuple[int, ...]
    channels: tuple[int, ...] = (3,)
    choices: dict[str, Any] = field(default_factory=dict)
    file_name: str = "net.pth"
    wrap: Callable[[Weights, Sizes], Any] = lambda weights, sizes: dict(weights)
    trim: bool = False


def gate(w: Weights, squeeze: str, expand: str, maps: Tensor, width: int, act: str = "relu") -> Tensor:
    pooled = maps.mean((2, 3), keepdim=True)
    return maps * torch.sigmoid(w.conv(expand, ACTS[act](w.conv(squeeze, pooled, width, 1)), maps.shape[1], 1))


def chain(scale: int) -> list[int]:
    steps = []
    while scale % 2 == 0:
        steps.append(2)
        scale //= 2
    return steps + [scale] * (scale > 1)


def official(
    w: Weights,
    x: Tensor,
    s: Sizes,
    *,
    act: str = "relu",
    gate_name: str = "conv_du",
    gate_act: str = "relu",
    tail_act: str | None = None,
    res_scale: float | None = 1.0,
    out_conv: bool = True,
    skip: bool = True,
    head: str = "head.0",
    factors: list[int] | None = None,
) -> Tensor:
    """The official body between two mean shifts."""
    first = w.conv(head, x, s.features)
    body = first
    for g in range(s.groups):
        start = body
        for b in range(s.blocks):
            at = f"body.{g}.body.{b}"
            branch = ACTS[act](w.conv(f"{at}.body.0", body, s.features))
            branch = w.conv(f"{at}.body.2", branch, s.features)
            name = f"{at}.body.3.{gate_name}"
            branch = gate(w, f"{name}.0", f"{name}.2", branch, s.width, gate_act)
            factor = w.take(f"{at}.res_scale", 1, spread=0.1, center=0.2) if res_scale is None else res_scale
            body = branch * factor + body
        if out_conv:
            body = w.conv(f"body.{g}.body.{s.blocks}", body, s.features)
        body = body + start if skip else body
    body = w.conv(f"body.{s.groups}", body, s.features) + first
    for k, factor_step in enumerate(chain(s.scale) if factors is None else factors):
        index = 3 * k if tail_act else 2 * k
        body = F.pixel_shuffle(w.conv(f"tail.0.{index}", body, factor_step**2 * s.features), factor_step)
        body = ACTS[tail_act](body) if tail_act else body
    return w.conv("tail.1", body, s.channels)


def shifted(size: float, **options: Any) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    """Official layout with stored mean shifts of a mean on 0..size, input multiplied by `times`."""
    times = options.pop("times", size)

    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        inner = official(w, w.shift("sub_mean", x * times, size, -1), s, **options)
        return w.shift("add_mean", inner, size, 1) / times

    return run


def unshuffled(norm: bool) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        factor = 4 // s.scale
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % factor, 0, -height % factor), mode="reflect")
        padded = w.shift("sub_mean", padded * 255, 255, -1) if norm else padded
        output = official(w, F.pixel_unshuffle(padded, factor), s, act="silu", head="head.1", factors=[2, 2])
        output = w.shift("add_mean", output, 255, 1) / 255 if norm else output
        return output[:, :, : s.scale * height, : s.scale * width]

    return run


def basicsr(w: Weights, x: Tensor, s: Sizes, res_scale: float = 1.0, img_range: float = 255.0) -> Tensor:
    first = w.conv("conv_first", (x - DIV2K) * img_range, s.features)
    body = first
    for g in range(s.groups):
        start = body
        for b in range(s.blocks):
            at = f"body.{g}.residual_group.{b}.rcab"
            branch = w.conv(f"{at}.2", torch.relu(w.conv(f"{at}.0", body, s.features)), s.features)
            body = gate(w, f"{at}.3.attention.1", f"{at}.3.attention.3", branch, s.width) * res_scale + body
        body = w.conv(f"body.{g}.conv", body, s.features) + start
    body = w.conv("conv_after_body", body, s.features) + first
    for k, factor in enumerate(chain(s.scale)):
        body = F.pixel_shuffle(w.conv(f"upsample.{2 * k}", body, factor**2 * s.features), factor)
    return w.conv("conv_last", body, 3) / img_range + DIV2K


def yjn870_rcan(w: Weights, x: Tensor, s: Sizes) -> Tensor:
    first = w.conv("sf", x, s.features)
    body = first
    for g in range(s.groups):
        start = body
        for b in range(s.blocks):
            at = f"rgs.{g}.module.{b}.module"
            branch = w.conv(f"{at}.2", torch.relu(w.conv(f"{at}.0", body, s.features)), s.features)
            body = gate(w, f"{at}.3.module.1", f"{at}.3.module.3", branch, s.width) + body
        body = w.conv(f"rgs.{g}.module.{s.blocks}", body, s.features) + start
    body = w.conv("conv1", body, s.features) + first
    return w.conv("conv2", F.pixel_shuffle(w.conv("upscale.0", body, s.scale**2 * s.features), s.scale), 3)


def lornatang_rcan(first_version: bool, factor: float) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    block, layer = (
        ("rca_block", "ca_layer")
        if first_version
        else (
            "residual_channel_attention_block",
            "channel_attention_layer",
        )
    )

    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        mean = w.take("mean", 1, 3, 1, 1, spread=0.05, center=0.44)
        std = w.take("std", 1, 3, 1, 1, spread=0.1, center=1.0) if first_version else 1.0
        first = w.conv("conv1", (x - mean) * factor / std, s.features)
        body = first
        for g in range(s.groups):
            start = body
            for b in range(s.blocks):
                at = f"trunk.{g}.residual_group.{b}.{block}"
                branch = w.conv(f"{at}.2", torch.relu(w.conv(f"{at}.0", body, s.features)), s.features)
                body = gate(w, f"{at}.3.{layer}.1", f"{at}.3.{layer}.3", branch, s.width) + body
            body = w.conv(f"trunk.{g}.residual_group.{s.blocks}", body, s.features) + start
        body = w.conv("conv2", body, s.features) + first
        for k, step in enumerate(chain(s.scale)):
            key = f"upsampling.{2 * k}" if first_version else f"upsampling.{k}.upsample_block.0"
            body = F.pixel_shuffle(w.conv(key, body, step**2 * s.features), step)
        return w.conv("conv3", body, 3) * std / factor + mean

    return run


def loseall(w: Weights, x: Tensor, s: Sizes) -> Tensor:
    first = w.conv("head.0.body.0", w.shift("sub_mean", x * 255, 255, -1), s.features)
    body = first
    for g in range(s.groups):
        start = body
        for b in range(s.blocks):
            at = f"body.{g}.body.{b}"
            branch = w.conv(f"{at}.c2", torch.relu(w.conv(f"{at}.c1.0", body, s.features)), s.features)
            body = gate(w, f"{at}.c3.0", f"{at}.c4.0", branch, s.width) + body
        body = w.conv(f"body.{g}.body.{s.blocks}.body.0", body, s.features) + start
    body = w.conv(f"body.{s.groups}.body.0", body, s.features) + first
    for k, step in enumerate(chain(s.scale)):
        body = F.pixel_shuffle(w.conv(f"tail.0.body.{k}.0", body, step**2 * s.features), step)
    return w.shift("add_mean", w.conv("tail.1.body.0", body, 3), 255, 1) / 255


def dense_block(
    w: Weights, maps: Tensor, keys: list[str], growth: int, act: Callable[[Tensor], Tensor], again: bool
) -> Tensor:
    """Layers that read the maps made in this block; `again` applies the activation to every concatenation too."""
    made = [act(w.conv(keys[0], maps, growth))]
    for key in keys[1:]:
        read = torch.cat(made, 1)
        made.append(act(w.conv(key, act(read) if again and len(made) > 1 else read, growth)))
    joined = torch.cat(made, 1)
    return act(joined) if again and len(made) > 1 else joined


def yjn870_srdensenet(w: Weights, x: Tensor, s: Sizes) -> Tensor:
    everything = torch.relu(w.conv("conv.conv", x, s.low))
    for n in range(s.blocks):
        keys = [f"dense_blocks.{n}.block.{layer}.conv" for layer in range(s.layers)]
        everything = torch.cat([everything, dense_block(w, everything, keys, s.growth, torch.relu, False)], 1)
    maps = torch.relu(w.conv("bottleneck.0", everything, s.bottleneck, 1))
    for key in ("deconv.0", "deconv.2"):
        maps = torch.relu(w.deconv(key, maps, s.bottleneck, 3, stride=2, padding=1, output_padding=1))
    return w.conv("reconstruction", maps, s.channels)


def wxywhu(second: bool) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        running = torch.relu(w.conv("conv1", x, s.low))
        for n in range(s.blocks):
            for layer in range(s.layers):
                key = f"denseblock.{n}.block.{layer}.conv" if second else f"dense{n + 1}.{layer}.conv"
                running = torch.cat([running, torch.relu(w.conv(key, running, s.growth))], 1)
        maps = w.conv("Bottleneck", running, s.bottleneck, 1)
        for key in ("convt1", "convt2"):
            maps = w.deconv(key, maps, s.bottleneck, 4, stride=2, padding=1)
        return w.conv("conv2", maps, s.channels)

    return run


def twtygqyy(kind: str) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    """kind: "prelu", "relu", "geosr" or "first"."""

    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        slopes = kind in ("prelu", "geosr")

        def act(key: str) -> Callable[[Tensor], Tensor]:
            return (lambda maps: w.prelu(key, maps)) if slopes else torch.relu

        low = act("relu")(w.conv("lowlevel", x, s.low))
        read = low
        for n in range(1, s.blocks + 1):
            keys = [f"denseblock{n}.0.conv{layer}" for layer in range(1, s.layers + 1)]
            made = dense_block(w, read, keys, s.growth, act(f"denseblock{n}.0.relu"), True)
            read = made if kind == "first" else torch.cat([read, made], 1)
        maps = torch.cat([low, read], 1) if kind == "first" else w.conv("bottleneck", read, s.bottleneck, 1, bias=False)
        width = maps.shape[1]
        for k in range(int(math.log2(s.scale))):
            key, slope = {
                "geosr": (f"deconv.{k}.0", f"deconv.{k}.1"),
                "first": (f"upscale4x.{2 * k}", ""),
            }.get(kind, (f"deconv.{2 * k}", f"deconv.{2 * k + 1}"))
            maps = act(slope)(w.deconv(key, maps, width, 2, bias=False, stride=2))
        return w.conv("reconstruction", maps, s.channels, bias=False)

    return run


def lornatang_srdensenet(early: bool) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        everything = torch.relu(w.conv("conv1.0", x, s.low))
        for n in range(1, s.blocks + 1):
            keys = [f"dcb{n}.0.conv{layer}" for layer in range(1, s.layers + 1)]
            everything = torch.cat([dense_block(w, everything, keys, s.growth, torch.relu, early), everything], 1)
        maps = w.conv("conv2", everything, s.bottleneck, 1)
        for k, step in enumerate(chain(s.scale)):
            key = f"upsampling.{2 * k}" if early else f"upsampling.{k}.upsample_block.0"
            maps = torch.relu(w.deconv(key, maps, s.bottleneck, step, stride=step))
        return w.conv("conv3", maps, s.channels)

    return run


def rdst(kind: str, act: str, normalised: bool, dense_scale: float = 1.0) -> Callable[[Weights, Tensor, Sizes], Tensor]:
    def run(w: Weights, x: Tensor, s: Sizes) -> Tensor:
        head = w.conv("head.0", w.shift("sub_mean", x, 1.0, -1), s.growth)
        running, outputs = head, []
        slope = w.take("slope", 1, spread=0.1, center=0.25) if act == "prelu" else None
        for n in range(s.blocks):
            for layer in range(s.layers):
                at = f"body.{n}.body.{layer}.body"
                new = w.conv(f"{at}.0", running, s.growth)
                new = w.norm(f"{at}.1", new) if normalised else new
                if slope is not None:
                    w[f"{at}.{2 if normalised else 1}.weight"] = slope.float()
                    new = F.prelu(new, slope)
                else:
                    new = ACTS[act](new)
                running = torch.cat([running, new * dense_scale], 1)
            outputs.append(running)
        read = {"h": outputs[-1:], "hl": [head, outputs[-1]], "all": [head, *outputs]}[kind]
        maps = w.conv("bottleneck", torch.cat(read, 1), s.bottleneck, 1)
        for k, step in enumerate(chain(s.scale)):
            maps = F.pixel_shuffle(w.conv(f"tail.0.{(3 if normalised else 2) * k}", maps, step**2 * s.bottleneck), step)
            maps = w.norm(f"tail.0.{3 * k + 2}", maps) if normalised else maps
        w.pop("slope", None)
        last = w.conv("tail.0" if s.scale == 1 else "tail.1", maps, s.channels)
        return w.shift("add_mean", last, 1.0, 1)

    return run


def zfhuang(w: Weights, x: Tensor, s: Sizes) -> Tensor:
    running = torch.relu(w.conv("input.0", x, s.low))
    for n in range(s.blocks):
        for layer in range(s.layers):
            at = f"dense_blocks.{n}.convs.{layer}"
            new = w.conv(f"{at}.2", torch.relu(w.norm(f"{at}.0", running)), s.growth)
            running = torch.cat([running, new], 1)
    maps = w.conv("bottleneck.0", running, s.bottleneck, 1)
    for k in range(int(math.log2(s.scale))):
        maps = w.deconv(f"deconv.{k}", maps, s.bottleneck, 3, stride=2, padding=1)
    return w.conv("output", maps, s.channels)


def trainner_file(**values: Any) -> Callable[[Weights, Sizes], Any]:
    return lambda w, s: {"metadata": {"scale": s.scale, "n_feats": s.features, **values}, "params": dict(w)}


CASES = [
    Case("official-rcan", shifted(255.0), (1, 2, 3, 4, 6, 8)),
    Case("official-rcan", shifted(1.0), (1, 2, 3, 4, 8)),
    Case("official-rcan", shifted(255.0, times=1.0), (2, 3, 4), file_name="pytorch_model_2x.pt"),
    Case("official-rcan", shifted(255.0, times=1.0), (2, 3), choices={"value_range": 1.0}),
    Case("official-rcan", official, (1, 2, 3, 4, 8), (1, 3)),
    Case(
        "official-rcan",
        lambda w, x, s: official(w, x, s, act="gelu"),
        (1, 2, 4),
        wrap=trainner_file(act_mode="gelu", norm=False),
    ),
    Case(
        "official-rcan",
        shifted(255.0, act="leaky_relu"),
        (2, 3),
        wrap=trainner_file(act_mode="leaky_relu", norm=True, rgb_range=255),
    ),
    Case("trainner-rcan-unshuffle", unshuffled(False), (1, 2), wrap=trainner_file(act_mode="silu")),
    Case("trainner-rcan-unshuffle", unshuffled(True), (1, 2), wrap=trainner_file(act_mode="silu", rgb_range=255)),
    Case("basicsr-rcan", basicsr, (1, 2, 3, 4, 8), wrap=lambda w, s: {"params": dict(w)}),
    Case(
        "basicsr-rcan",
        lambda w, x, s: basicsr(w, x, s, res_scale=0.3, img_range=1.0),
        (2, 3),
        choices={"res_scale": 0.3, "value_range": 1.0},
    ),
    Case("yjn870-rcan", yjn870_rcan, (1, 2, 3, 4, 5, 8)),
    Case("lornatang-rcan", lornatang_rcan(False, 255.0), (2, 3, 4, 8), choices={"value_range": 255.0}),
    Case(
        "lornatang-rcan",
        lornatang_rcan(False, 255.0),
        (2, 8),
        wrap=lambda w, s: {"state_dict": dict(w), "epoch": 1, "scheduler": {"last_epoch": 1}},
    ),
    Case(
        "lornatang-rcan",
        lornatang_rcan(False, 1.0),
        (2, 3, 4, 8),
        wrap=lambda w, s: {
            "state_dict": dict(w),
            "ema_state_dict": {"n_averaged": torch.tensor(1), **{f"module.{key}": w[key] * 0.9 for key in w}},
            "scheduler": {},
        },
    ),
    Case("lornatang-rcan-first", lornatang_rcan(True, 1.0), (2, 3, 4, 8)),
    Case(
        "rcan-it",
        shifted(255.0, act="silu", gate_act="silu", tail_act="silu", gate_name="excitation", res_scale=0.1),
        (1, 2, 3, 4, 8),
        choices={"activation": "silu", "res_scale": 0.1},
    ),
    Case(
        "rcan-it",
        shifted(
            255.0, gate_act="relu", tail_act="relu", gate_name="excitation", res_scale=None, out_conv=False, skip=False
        ),
        (2, 4),
        choices={"activation": "relu", "group_skip": False},
    ),
    Case("loseall-rcan", loseall, (1, 2, 3, 4, 5, 6, 8)),
    Case("yjn870-srdensenet", yjn870_srdensenet, (4,), (1, 3)),
    Case("wxywhu-srdensenet-v1", wxywhu(False), (4,), (1,), wrap=lambda w, s: {"epoch": 1, "model": dict(w)}),
    Case("wxywhu-srdensenet-v2", wxywhu(True), (4,), (1,)),
    Case("twtygqyy-srdensenet-prelu", twtygqyy("prelu"), (4,), (1,)),
    Case("twtygqyy-srdensenet-relu", twtygqyy("relu"), (4,), (1,)),
    Case("twtygqyy-srdensenet-first", twtygqyy("first"), (4,), (1,)),
    Case("geosr-srdensenet", twtygqyy("geosr"), (2, 4, 8), (1, 3)),
    Case("lornatang-srdensenet", lornatang_srdensenet(False), (2, 3, 4, 8), (1, 3)),
    Case("lornatang-srdensenet-2021", lornatang_srdensenet(True), (4,), (1,)),
    *(
        Case("rdst-srdensenet", rdst(kind, "relu", False), (1, 2, 3, 4), (1, 3), choices={"activation": "relu"})
        for kind in ("h", "hl", "all")
    ),
    Case("rdst-srdensenet", rdst("all", "prelu", True), (1, 2, 4), (1,)),
    Case("rdst-srdensenet", rdst("hl", "prelu", False), (1, 2, 3), (1,)),
    Case(
        "rdst-srdensenet",
        rdst("hl", "leaky_relu", True, 0.7),
        (2, 4),
        (1,),
        choices={"activation": "leaky_relu", "layer_scale": 0.7},
    ),
    Case("zfhuang-srdensenet", zfhuang, (2, 4, 8), (1,), trim=True),
]


def random_sizes(case: Case, choose: random.Random) -> Sizes:
    """Return random small sizes that a family exists in."""
    return Sizes(
        scale=choose.choice(case.scales),
        groups=choose.randint(1, 3),
        blocks=choose.randint(1, 3),
        features=choose.randint(2, 6),
        width=choose.randint(1, 3),
        channels=choose.choice(case.channels),
        growth=choose.randint(1, 4),
        layers=choose.randint(1, 3),
        low=choose.randint(1, 6),
        bottleneck=choose.randint(2, 6),
    )


def write_checkpoint(case: Case, sizes: Sizes, seed: int, folder: Path) -> Path:
    """Write a checkpoint of a family with random weights, under its own keys."""
    weights = Weights(seed)
    case.run(weights, torch.rand(1, sizes.channels, 5, 6, generator=weights.generator).double(), sizes)
    path = folder / case.file_name
    torch.save(case.wrap(weights, sizes), path)
    return path
