"""What opening and running needs on full TensorRT only: CUDA graphs are captured by the runner."""

from collections.abc import Sequence
from typing import Any

import torch

from srdeploy.core.errors import UsageError
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.families import Flavour
from srdeploy.runtime.engines.tensorrt.open import deserialized
from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner


def open_full(
    flavour: Flavour, trt: Any, engine: Engine, device: str, outputs: Sequence[str] | None, *, graphs: bool = True
) -> TensorRtRunner:
    """Deserialize a checked engine and open a runner on it."""
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    with torch.cuda.device(device):
        native = deserialized(flavour, trt, engine)
    return TensorRtRunner(
        flavour,
        trt,
        engine,
        native,
        device,
        configure=lambda runtime_config: None,
        capture=graphs,
        on_close=lambda: None,
    )
