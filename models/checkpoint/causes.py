"""Why a set of names is not the network that it resembles: the weights that it computes with are not in the file."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.filebytes import shown
from srdeploy.models.checkpoint.tensors import FULL_STATE


class _Cause(NamedTuple):
    names: re.Pattern[str]
    found: str
    next_step: str


_CAUSES = (
    _Cause(
        re.compile(r"(^|\.)lora_(A|B|down|up|embedding|magnitude)"),
        "low-rank adapters (LoRA)",
        "merge them into the weights before saving (peft: model.merge_and_unload())",
    ),
    _Cause(
        re.compile(r"fake_quant|activation_post_process|_amax$|\.float_weight$"),
        "the observers of quantization-aware training",
        "save the float network's state_dict() before prepare_qat; srdeploy quantize makes INT8 graphs from it",
    ),
    _Cause(
        re.compile(r"_packed_params|\.zero_point$"),
        "quantized weights",
        "save the float network's state_dict() before it is converted; srdeploy quantize makes INT8 graphs from it",
    ),
    _Cause(
        re.compile(r"(^|\.)_?flat_param"),
        "flat parameters of FSDP, which are one shard of many layers",
        FULL_STATE,
    ),
)


def cause_of(tensors: Mapping[str, Tensor]) -> InputError | None:
    """Return the error for a state dict whose weights are kept in a form that is not read; None if it is another."""
    for cause in _CAUSES:
        name = next((name for name in tensors if cause.names.search(name)), None)
        if name is not None:
            return _error(name, cause.found, cause.next_step)
    if tensors and all(tensor.shape == (0,) for tensor in tensors.values()):
        return _error(
            next(iter(tensors)),
            "empty placeholders, as DeepSpeed ZeRO-3 leaves them in mp_rank files",
            "run the zero_to_fp32.py that DeepSpeed put beside the checkpoint, and pass its result",
        )
    return None


def _error(name: str, found: str, next_step: str) -> InputError:
    return InputError(
        f"the checkpoint holds {found} ({shown(name)})", expected="a network's own weights", next_step=next_step
    )
