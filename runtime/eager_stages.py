"""A PyTorch network as stages (see `srdeploy.runtime.stages`), traced with `torch.fx`."""

import operator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import UsageError
from srdeploy.models.mean_shift import MeanShift
from srdeploy.runtime.stages import Cut, Operation, Stage, cut

_POINTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.PReLU, nn.Identity, MeanShift,
    operator.add, operator.sub, operator.mul, operator.truediv, torch.sigmoid,
)  # fmt: skip
_PROBE_SIDE = 8


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Stop at the layers themselves, whoever defined them."""
        return not any(True for _ in module.children())


def stages_from_network(network: nn.Module, channels: int) -> list[Stage]:
    """Cut a network at its poolings.

    Args:
        network: (N, C, H, W) to (N, C, H', W'); its modules are shared, not copied.
        channels: C.

    Raises:
        UsageError: it does what cannot be traced, or is neither local nor a mean over the whole map.
    """
    try:
        graph = _Tracer().trace(network)
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise UsageError(
            f"a network whose steps depend on the picture ({error})",
            expected="the same steps for every picture",
            next_step="use --tiles overlapped",
        ) from error
    traced = torch.fx.GraphModule(network, graph)
    graph.eliminate_dead_code()  # sizes that were asked for and not used
    weight = next(network.parameters())
    ShapeProp(traced).propagate(weight.new_zeros(1, channels, _PROBE_SIDE, _PROBE_SIDE))
    nodes = {_name(node): node for node in graph.nodes}
    operations = [
        _operation(node, traced) for node in graph.nodes if node.op in ("call_module", "call_function", "call_method")
    ]
    return [_stage(part, traced, nodes) for part in cut(operations)]


def _name(node: torch.fx.Node) -> str:
    """Return a tensor's name: as everywhere, `input` and `output` are the network's own."""
    if node.op == "placeholder":
        return INPUT
    return OUTPUT if any(user.op == "output" for user in node.users) else f"{node.name}."


def _operation(node: torch.fx.Node, traced: torch.fx.GraphModule) -> Operation:
    step: Any = traced.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    kind: Literal["local", "pool", "other"] = "other"
    reach, growth = 0, 1
    if isinstance(step, nn.Conv2d):
        sides = [(size - 1) // 2 * by for size, by in zip(step.kernel_size, step.dilation, strict=True)]
        odd = all(size % 2 for size in step.kernel_size)
        if odd and step.stride == (1, 1) and step.padding == tuple(sides) and step.padding_mode == "zeros":
            kind, reach = "local", max(sides)
    elif isinstance(step, nn.PixelShuffle):
        kind, growth = "local", step.upscale_factor
    elif step in _POINTWISE or type(step) in _POINTWISE or (step is F.pixel_unshuffle and node.args[1] == 1):
        kind = "local"
    elif step == "mean" and node.args[1:] == ((2, 3),) and node.kwargs == {"keepdim": True}:
        kind = "pool"
    return Operation(
        node=node,
        label=f"{type(step).__name__ if isinstance(step, nn.Module) else step} ({node.name})",
        kind=kind,
        inputs=tuple(_name(source) for source in node.all_input_nodes),
        outputs=(_name(node),),
        reach=reach,
        growth=growth,
    )


def _stage(part: Cut, traced: torch.fx.GraphModule, nodes: dict[str, torch.fx.Node]) -> Stage:
    """Make a stage: a module that takes `maps_in` and `means_in` in order and gives named tensors."""
    graph = torch.fx.Graph()
    made = {nodes[name]: graph.placeholder(f"taken_{at}") for at, name in enumerate((*part.maps_in, *part.means_in))}

    def placed(source: torch.fx.Node) -> torch.fx.Node:
        if source not in made:  # a parameter
            made[source] = graph.node_copy(source)
        return made[source]

    for operation in part.operations:
        made[operation.node] = graph.node_copy(operation.node, placed)
    names = dict.fromkeys((*part.maps_out, OUTPUT if part.pooled is None else part.pooled))
    graph.output({name: made[nodes[name]] for name in names})
    widths = [int(nodes[name].meta["tensor_meta"].shape[1]) for name in part.maps_out]
    return Stage(
        model=torch.fx.GraphModule(traced, graph),
        maps_in=part.maps_in,
        means_in=part.means_in,
        maps_out=part.maps_out,
        pooled=part.pooled,
        mean=part.mean,
        radius=part.radius,
        channels=max(widths, default=1),
    )
