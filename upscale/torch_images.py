"""Run torch tensors through an upscaler, without copies if the tensor is a network input already."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import GateError, UsageError
from srdeploy.upscale.guards import fault_of

if TYPE_CHECKING:
    from srdeploy.upscale.upscaler import Upscaler


def upscale_tensor(up: "Upscaler", image: torch.Tensor) -> torch.Tensor:
    """Upscale a tensor.

    Args:
        up: the upscaler.
        image: (C, H, W) or (N, C, H, W), uint8 or float32 in 0..1; C as for numpy pictures. Float planes in the
            network's color model that run as a whole are passed to the engine without a copy, on the CPU or, if the
            engine accepts tensors there, on the GPU. All others are converted, CUDA tensors on the host.

    Returns:
        The same layout, type and device.

    Raises:
        UsageError: another type or shape.
        InputError, GateError: as calling the upscaler.
    """
    if image.dtype not in (torch.uint8, torch.float32) or image.ndim not in (3, 4) or 0 in image.shape:
        raise UsageError(
            f"a tensor of {image.dtype} and shape {tuple(image.shape)}",
            expected="(C, H, W) or (N, C, H, W) of torch.uint8 or torch.float32",
        )
    batch = image.detach() if image.ndim == 4 else image.detach()[None]
    output = _on_gpu(up, batch)
    if output is None:
        pictures = [_on_host(up, picture.cpu()) for picture in batch]
        output = (pictures[0][None] if len(pictures) == 1 else torch.stack(pictures)).to(image.device)
    return output if image.ndim == 4 else output[0]


def _on_host(up: "Upscaler", picture: torch.Tensor) -> torch.Tensor:
    if _is_input(up, picture[None]):
        return torch.from_numpy(up.run_planes(picture[None].numpy())[0])
    pixels = picture.permute(1, 2, 0).numpy()  # (H, W, C), a view
    return torch.from_numpy(np.ascontiguousarray(up(pixels).transpose(2, 0, 1)))


def _is_input(up: "Upscaler", batch: torch.Tensor) -> bool:
    """Return True if planes are a network input as they are: its color model, and every picture as a whole."""
    contract = up.contract
    if batch.dtype != torch.float32 or batch.shape[1] != contract.channels or contract.colours != "rgb":
        return False
    if contract.form.io != "float32":
        return False
    if not up.info.accepts(tuple(batch.shape)):
        return False
    plan = up.decide(batch.shape[2], batch.shape[3]).plan
    return plan.whole and not plan.rows.padding and not plan.columns.padding


def _on_gpu(up: "Upscaler", batch: torch.Tensor) -> torch.Tensor | None:
    """Run float planes on their GPU; None if the engine, the type or the size does not allow it."""
    if batch.device.type != "cuda" or not hasattr(up.runner, "run_tensors") or not _is_input(up, batch):
        return None
    output: torch.Tensor = up.run_tensors({INPUT: batch})[OUTPUT]
    for tile, result in zip(batch, output, strict=True):
        extremes = [torch.stack(torch.aminmax(planes)).float().cpu().numpy() for planes in (tile, result)]
        if fault := fault_of(extremes[0], extremes[1]):
            raise GateError(f"{up.info.name} gave {fault}", next_step="pass the tensor on the CPU to use the fallback")
    return output.to(batch.dtype)
