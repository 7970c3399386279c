"""Small honest checkpoints of every container and wrapper, with random weights, as training scripts write them."""

import functools
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from checkpoint_fuzzing.pickles import Call, Name, New, Persistent, Values, legacy_file, tensor, zip_file

Shapes = dict[str, tuple[int, ...]]

_FEATURES, _HIDDEN, _GROUPS, _BLOCKS = 8, 2, 2, 2


def _convolution(shapes: Shapes, name: str, outputs: int, inputs: int, size: int = 3, *, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs, size, size)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def official_rcan() -> Shapes:
    """Names and shapes of a tiny x2 RCAN in the layout of its authors, without mean shift."""
    shapes: Shapes = {}
    width = _FEATURES
    _convolution(shapes, "head.0", width, 3)
    for group in range(_GROUPS):
        for block in range(_BLOCKS):
            name = f"body.{group}.body.{block}.body"
            _convolution(shapes, f"{name}.0", width, width)
            _convolution(shapes, f"{name}.2", width, width)
            _convolution(shapes, f"{name}.3.conv_du.0", _HIDDEN, width, 1)
            _convolution(shapes, f"{name}.3.conv_du.2", width, _HIDDEN, 1)
        _convolution(shapes, f"body.{group}.body.{_BLOCKS}", width, width)
    _convolution(shapes, f"body.{_GROUPS}", width, width)
    _convolution(shapes, "tail.0.0", 4 * width, width)
    _convolution(shapes, "tail.1", 3, width)
    return shapes


def basicsr_rcan() -> Shapes:
    """Names and shapes of a tiny x2 RCAN in BasicSR's layout."""
    shapes: Shapes = {}
    width = _FEATURES
    _convolution(shapes, "conv_first", width, 3)
    for group in range(_GROUPS):
        for block in range(_BLOCKS):
            name = f"body.{group}.residual_group.{block}.rcab"
            _convolution(shapes, f"{name}.0", width, width)
            _convolution(shapes, f"{name}.2", width, width)
            _convolution(shapes, f"{name}.3.attention.1", _HIDDEN, width, 1)
            _convolution(shapes, f"{name}.3.attention.3", width, _HIDDEN, 1)
        _convolution(shapes, f"body.{group}.conv", width, width)
    _convolution(shapes, "conv_after_body", width, width)
    _convolution(shapes, "upsample.0", 4 * width, width)
    _convolution(shapes, "conv_last", 3, width)
    return shapes


def yjn870_srdensenet() -> Shapes:
    """Names and shapes of a tiny x4 SRDenseNet in yjn870's layout."""
    shapes: Shapes = {}
    growth, layers, blocks, bottleneck = 4, 2, 2, 16
    step = growth * layers
    _convolution(shapes, "conv.conv", step, 1)
    for block in range(blocks):
        for layer in range(layers):
            inputs = step * (block + 1) if layer == 0 else growth * layer
            _convolution(shapes, f"dense_blocks.{block}.block.{layer}.conv", growth, inputs)
    _convolution(shapes, "bottleneck.0", bottleneck, step * (blocks + 1), 1)
    for index in (0, 2):
        _convolution(shapes, f"deconv.{index}", bottleneck, bottleneck)
    _convolution(shapes, "reconstruction", 1, bottleneck)
    return shapes


def wxywhu_srdensenet() -> Shapes:
    """Names and shapes of a tiny x4 SRDenseNet in wxywhu's first layout, which is a pickled module."""
    shapes: Shapes = {}
    growth, layers, bottleneck = 4, 2, 16
    running = growth
    _convolution(shapes, "conv1", growth, 1)
    for block in range(1, 9):
        for layer in range(layers):
            _convolution(shapes, f"dense{block}.{layer}.conv", growth, running)
            running += growth
    _convolution(shapes, "Bottleneck", bottleneck, running, 1)
    _convolution(shapes, "convt1", bottleneck, bottleneck, 4)
    _convolution(shapes, "convt2", bottleneck, bottleneck, 4)
    _convolution(shapes, "conv2", 1, bottleneck)
    return shapes


def random_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return a state dict of small random weights."""
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def torch_file(value: Any, *, legacy: bool) -> bytes:
    """Return what this PyTorch's torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def module_file(shapes: Shapes, kind: Name, *, legacy: bool, parallel: bool = False, device: str = "cpu") -> bytes:
    """Return {"epoch", "model"} with a pickled network of a class that exists nowhere."""
    storages: list[Values] = []
    random_values = random.Random(0)
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = tuple(random_values.gauss(0, 0.1) for _ in range(math.prod(shape)))
        storages.append(Values(str(len(storages)), values, device))
        data = tensor(storages[-1].identifier(legacy=legacy), shape)
        ordered = Call(Name("collections", "OrderedDict"), ())
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = Call(Name("torch._utils", "_rebuild_parameter"), (data, True, ordered))
    network = _module(tree, kind, legacy=legacy)
    if parallel:
        network = _module({"module": network}, Name("torch.nn.parallel.data_parallel", "DataParallel"), legacy=legacy)
    root = {"epoch": 50, "model": network}
    return (legacy_file if legacy else zip_file)(root, tuple(storages))


def _module(tree: dict[str, Any], kind: Name, *, legacy: bool) -> New:
    parameters = {name: value for name, value in tree.items() if isinstance(value, Call)}
    children = {
        name: value
        if isinstance(value, New)
        else _module(value, Name("torch.nn.modules.conv", "Conv2d"), legacy=legacy)
        for name, value in tree.items()
        if not isinstance(value, Call)
    }
    state = {"training": False, "_parameters": parameters, "_buffers": {}, "_modules": children}
    if "weight" in parameters:
        shape = parameters["weight"].arguments[0].arguments[2]
        state["kernel_size"] = shape[2:]
    described = Persistent(("module", kind, "/home/user/net.py", "# source")) if legacy else kind
    return New(described, (), state)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of each seed: those made here, then the small checkpoints that the tests come with."""
    for name, make in SEEDS.items():
        yield name, make()
    for path in sorted((Path(__file__).parents[2] / "data" / "checkpoints").glob("*/*")):
        if path.suffix in (".pt", ".pth", ".tar", ".safetensors"):
            yield f"{path.parent.name}/{path.name}", path.read_bytes()


def _training_file() -> bytes:
    state = random_state(official_rcan())
    optimizer = torch.optim.Adam([torch.nn.Parameter(value.clone()) for value in state.values()])
    averaged = {f"module.{name}": value.clone() for name, value in state.items()} | {"n_averaged": torch.tensor(7)}
    document = {
        "epoch": 3,
        "best_psnr": 31.5,
        "state_dict": state,
        "ema_state_dict": averaged,
        "optimizer": optimizer.state_dict(),
    }
    return torch_file(document, legacy=False)


def _trainner_file() -> bytes:
    state = random_state(official_rcan())
    arguments = {"scale": 2, "n_resgroups": _GROUPS, "n_resblocks": _BLOCKS, "n_feats": _FEATURES, "norm": False}
    return bytes(save_safetensors(state, metadata={"metadata": json.dumps(arguments)}))


def _basicsr_file() -> bytes:
    state = random_state(basicsr_rcan())
    return torch_file({"params": state, "params_ema": {k: v + 0.01 for k, v in state.items()}}, legacy=False)


def _npz_file() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: value.numpy() for name, value in random_state(official_rcan()).items()})
    return stream.getvalue()


def _lightning_file() -> bytes:
    state = {f"model.{name}": value for name, value in random_state(official_rcan()).items()}
    state |= {f"model_ema.{name[6:].replace('.', '')}": value + 0.01 for name, value in state.items()}
    options = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-4), "seed": np.random.RandomState(0).get_state()}
    return torch_file(
        {"state_dict": {**state, "loss.weight": torch.ones(3)}, "hyper_parameters": options}, legacy=False
    )


def _reparametrized_file() -> bytes:
    state = random_state(official_rcan())
    weight = state.pop("head.0.weight")
    state |= {"head.0.weight_g": weight.flatten(1).norm(dim=1)[:, None, None, None], "head.0.weight_v": weight}
    mask = torch.ones_like(state["tail.1.weight"])
    state |= {"tail.1.weight_orig": state.pop("tail.1.weight"), "tail.1.weight_mask": mask}
    return torch_file(state, legacy=False)


NET = Name("SR_DenseNet", "Net")
SEEDS: dict[str, Callable[[], bytes]] = {
    "official_rcan.legacy.pt": lambda: torch_file(random_state(official_rcan()), legacy=True),
    "official_rcan.zip.pt": lambda: torch_file(random_state(official_rcan()), legacy=False),
    "official_rcan.float16.pt": lambda: torch_file(random_state(official_rcan(), torch.float16), legacy=False),
    "official_rcan.training.pth.tar": _training_file,
    "official_rcan.trainner.safetensors": _trainner_file,
    "official_rcan.npz": _npz_file,
    "official_rcan.arrays.pth": lambda: torch_file(
        {name: value.numpy() for name, value in random_state(official_rcan()).items()}, legacy=False
    ),
    "official_rcan.lightning.ckpt": _lightning_file,
    "official_rcan.reparametrized.pth": _reparametrized_file,
    "basicsr_rcan.ema.pth": _basicsr_file,
    "yjn870_srdensenet.legacy.pth": lambda: torch_file(random_state(yjn870_srdensenet()), legacy=True),
    "yjn870_srdensenet.safetensors": lambda: save_safetensors(random_state(yjn870_srdensenet())),
    "wxywhu_srdensenet.legacy.pth": lambda: module_file(wxywhu_srdensenet(), NET, legacy=True, device="cuda:0"),
    "wxywhu_srdensenet.zip.pth": lambda: module_file(wxywhu_srdensenet(), NET, legacy=False),
    "wxywhu_srdensenet.parallel.pth": lambda: module_file(wxywhu_srdensenet(), NET, legacy=False, parallel=True),
}
