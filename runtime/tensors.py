"""Torch tensors in and out of an upscaler. CPU tensors share their memory with numpy on the way in."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import GateError, UsageError
from srdeploy.core.runner import Runner
from srdeploy.runtime.guards import fault_of

if TYPE_CHECKING:
    from srdeploy.runtime.upscaler import Upscaler


def upscale_tensor(up: "Upscaler", image: torch.Tensor) -> torch.Tensor:
    """Upscale planes.

    Args:
        up: the upscaler.
        image: (C, H, W) or (N, C, H, W), uint8 or float32 in 0..1; C as for numpy pictures. CUDA tensors stay on the
            GPU when the engine takes tensors there and the picture runs as a whole; else they pass through the host.

    Returns:
        The same layout, type and device.

    Raises:
        UsageError: another type or shape.
        GateError: as calling the upscaler.
    """
    if image.dtype not in (torch.uint8, torch.float32) or image.ndim not in (3, 4):
        raise UsageError(
            f"a tensor of {image.dtype} and shape {tuple(image.shape)}",
            expected="(C, H, W) or (N, C, H, W) of torch.uint8 or torch.float32",
        )
    batch = image.detach() if image.ndim == 4 else image.detach()[None]
    direct = _on_device(up, batch)
    if direct is None:
        pictures = [_through_host(up, picture) for picture in batch]
        direct = torch.stack(pictures).to(image.device)
    return direct if image.ndim == 4 else direct[0]


def _through_host(up: "Upscaler", picture: torch.Tensor) -> torch.Tensor:
    pixels = picture.cpu().permute(1, 2, 0).numpy()  # (H, W, C), a view
    return torch.from_numpy(np.ascontiguousarray(up(pixels).transpose(2, 0, 1)))


def _on_device(up: "Upscaler", batch: torch.Tensor) -> torch.Tensor | None:
    """Run float planes where they are; None when the engine, the type or the size asks for the ordinary road."""
    runner: Runner | Any = up.runner
    if batch.device.type != "cuda" or not hasattr(runner, "run_tensors") or batch.dtype != torch.float32:
        return None
    if batch.shape[1] != up.contract.channels or up.contract.colours != "rgb":
        return None
    decision = up.decide(batch.shape[2], batch.shape[3])
    if not decision.plan.whole or decision.plan.rows.padding or decision.plan.columns.padding:
        return None
    if up.info.profile is not None and not up.info.profile.contains(tuple(batch.shape)):
        return None
    output: torch.Tensor = runner.run_tensors({INPUT: batch})[OUTPUT]
    for tile, result in zip(batch, output, strict=True):
        extremes = [torch.stack(torch.aminmax(planes)).float().cpu().numpy() for planes in (tile, result)]
        if fault := fault_of(extremes[0], extremes[1]):
            raise GateError(f"{up.info.name} gave {fault}", next_step="pass the tensor on the CPU to use the fallback")
    return output.to(batch.dtype)
