"""The only call of the torch exporter: a network becomes an ONNX graph with dynamic batch, height and width.

Where the time of `torch.onnx.export` goes, for the 3,660 graph nodes of RCAN x4: a third into tracing the network once,
half into tracing it a second time to decompose operators, a sixth into writing ONNX. The second trace changes nothing
when every operator has a translation of its own, which is true of all that our networks do except batch normalisation;
such a program (`_Lowered`) skips the decomposition.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir
import torch
from onnxscript import opset20 as op
from torch import nn
from torch.export import Dim, ExportedProgram

from srdeploy.core.contract import INPUT, OUTPUT

_TRANSLATED = frozenset(
    {
        "aten.add.Tensor",
        "aten.cat.default",
        "aten.conv2d.default",
        "aten.conv_transpose2d.input",
        "aten.div.Tensor",
        "aten.elu.default",
        "aten.gelu.default",
        "aten.leaky_relu.default",
        "aten.mean.dim",
        "aten.mul.Tensor",
        "aten.pixel_shuffle.default",
        "aten.pixel_unshuffle.default",
        "aten.prelu.default",
        "aten.relu.default",
        "aten.sigmoid.default",
        "aten.silu.default",
        "aten.sub.Tensor",
    }
)
"""Operators of our networks that the exporter translates as they are, without decomposing them first."""


def graph_from_network(network: nn.Module, *, channels: int, opset: int) -> onnx_ir.Model:
    """Export a network.

    Args:
        network: evaluation mode, (N, channels, H, W) float32 to one tensor.
        channels: image channels.
        opset: ONNX operator set.

    Returns:
        The graph as exported, with inputs and outputs named by the contract.
    """
    # The sizes are only an example; minimum sizes keep the tracer from looking for special cases below them. The graph
    # is checked on smaller images than that.
    example = torch.zeros(2, channels, 10, 12)
    dynamic = {0: Dim("batch", min=2), 2: Dim("height", min=9), 3: Dim("width", min=9)}
    with _quiet_exporter(), torch.no_grad():
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=(dynamic,),
            strict=False,
            # Facts such as "the crop is not larger than the image" are checked when the graph runs, where the tracer
            # cannot prove them for every size.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        if operators_of(program) <= _TRANSLATED:
            program = _Lowered.of(program)
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table={
                torch.ops.aten.pixel_unshuffle.default: _pixel_unshuffle,
                torch.ops.aten.conv_transpose2d.input: _transposed_convolution,
            },
            optimize=False,  # it would share equal weights between layers, which later stages change one by one
            verbose=False,
        )
    assert exported is not None
    return exported.model


def operators_of(program: ExportedProgram) -> set[str]:
    """Return the names of the operators that an exported program calls."""
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


class _Lowered(ExportedProgram):
    """A program whose operators all have an ONNX translation of their own, so that none is to be decomposed."""

    @classmethod
    def of(cls, program: ExportedProgram) -> "_Lowered":
        return cls(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        """Return the program as it is."""
        return self


def _pixel_unshuffle(image: Any, factor: int) -> Any:
    """Translate a pixel unshuffle: SpaceToDepth, whose channels come as (row, column, channel), then a reordering.

    The exporter's own translation is a chain of Reshape and Transpose with sizes computed in the graph.
    """
    if factor == 1:
        return op.Identity(image)
    channels = image.shape[1]
    order = [(place * channels + channel) for channel in range(channels) for place in range(factor**2)]
    return op.Gather(op.SpaceToDepth(image, blocksize=factor), op.Constant(value_ints=order), axis=1)


def _transposed_convolution(
    maps: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Any:
    """Translate a transposed convolution, which the exporter knows only in its decomposed form."""
    return op.ConvTranspose(
        maps,
        weight,
        bias,
        strides=list(stride),
        pads=[*padding, *padding],
        output_padding=list(output_padding),
        group=groups,
        dilations=list(dilation),
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's warnings about itself (missing torchvision, its own deprecations)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
