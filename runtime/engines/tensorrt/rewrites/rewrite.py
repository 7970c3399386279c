"""All rewrites for one product."""

from collections.abc import Callable

import onnx

from srdeploy.runtime.engines.tensorrt.rewrites.concatenation import chain_concatenations
from srdeploy.runtime.engines.tensorrt.rewrites.deconvolutions import add_biases_apart, deconvolve_joined_maps
from srdeploy.runtime.engines.tensorrt.rewrites.gates import weight_rows
from srdeploy.runtime.engines.tensorrt.rewrites.shuffles import convolve_before_shuffles

Rewrite = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, int]]
"""From a graph to an equal one and the number of nodes that were changed; the argument stays as it is."""

EVERYWHERE: dict[str, Rewrite] = {"concatenations_chained": chain_concatenations}
"""For both products. The names are those of the counts in the sidecar."""
AHEAD_OF_TIME: dict[str, Rewrite] = {
    "pooled_maps_multiplied": weight_rows,
    "convolutions_before_shuffles": convolve_before_shuffles,
    "joined_maps_deconvolved": deconvolve_joined_maps,
    "biases_added_apart": add_biases_apart,
}
"""For TensorRT-RTX. TensorRT times its own choices on the GPU, where none of these was measured."""


def rewrite(model: onnx.ModelProto, *, ahead_of_time: bool) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return a graph of the same values and the number of nodes that each rewrite changed.

    Args:
        model: of any precision; it stays as it is.
        ahead_of_time: for TensorRT-RTX.
    """
    counts = {}
    for name, change in {**EVERYWHERE, **(AHEAD_OF_TIME if ahead_of_time else {})}.items():
        model, counts[name] = change(model)
    return model, counts
