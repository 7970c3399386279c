"""Cut a network at its global poolings, so that tiles can wait for each other there.

Channel attention makes every output pixel depend on the mean of whole feature maps, so no overlap makes tiles equal to
the whole image. But between two poolings the network is local: a stage takes feature maps and the means so far, and
gives feature maps and what the next mean is taken of. Run each stage over all tiles, average over the whole image, go
on: the result is the whole image's. `srdeploy.runtime.lock_step` does that; here the graph is cut.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import onnx
from onnx import TensorProto, helper

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import UsageError

_POOLS = ("GlobalAveragePool", "ReduceMean")
_POINTWISE = (
    "Add", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mul", "PRelu", "QuantizeLinear", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh",
)  # fmt: skip
"""Operations whose output pixel depends on the same pixel of their inputs only."""


@dataclass(frozen=True)
class Stage:
    """The network between two poolings.

    Attributes:
        model: the stage as an ONNX model of its own.
        maps_in: feature maps it takes, (1, C, h, w); the first stage takes `input`.
        means_in: means it takes, (1, C, 1, 1).
        maps_out: feature maps that later stages take.
        pooled: the map whose mean ends the stage; None for the last, whose output is `output`.
        mean: name of that mean.
        radius: pixels on each side that an output pixel depends on.
    """

    model: onnx.ModelProto
    maps_in: tuple[str, ...]
    means_in: tuple[str, ...]
    maps_out: tuple[str, ...]
    pooled: str | None
    mean: str | None
    radius: int


def cut_at_poolings(model: onnx.ModelProto) -> list[Stage]:
    """Cut an ONNX network into stages.

    Raises:
        UsageError: the graph has an operation that is neither local nor a mean over the whole map.
    """
    graph = _Graph.of(model)
    done: set[str] = set()  # maps computed by earlier stages
    stages = []
    for pool in [*graph.pools, None]:
        target = OUTPUT if pool is None else pool.input[0]
        nodes = graph.nodes_for(target, done)
        made = {name for node in nodes for name in node.output if name in graph.maps}
        # A stage can take the mean of a map that an earlier one left: then it has nothing to compute but that.
        later = graph.taken_later(done | made, pool)
        stages.append(_stage(graph, nodes, target, pool, tuple(sorted(made & later)), done))
        done |= made
    return stages


def live_maps(stages: Iterable[Stage]) -> int:
    """Return the most feature maps that wait at the same time, those being written included."""
    listed = list(stages)
    most = 0
    for index, stage in enumerate(listed):
        needed = {name for later in listed[index + 1 :] for name in later.maps_in}
        waiting = {name for earlier in listed[: index + 1] for name in earlier.maps_out}
        most = max(most, len((needed | set(stage.maps_in)) & waiting | set(stage.maps_out)))
    return most


@dataclass(frozen=True, eq=False)
class _Graph:
    """A network's nodes by what they make, and which tensors are maps (the size of the image, times a factor)."""

    model: onnx.ModelProto
    makers: dict[str, onnx.NodeProto]
    pools: list[onnx.NodeProto]
    maps: set[str]
    types: dict[str, onnx.ValueInfoProto]
    constants: dict[str, onnx.TensorProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Graph":
        inferred = onnx.shape_inference.infer_shapes(model)
        graph = inferred.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        maps = {INPUT}
        pools = []
        for node in graph.node:
            if not any(name in maps for name in node.input):
                continue
            if node.op_type in _POOLS and node.input[0] in maps:
                _check_pool(node, constants)
                pools.append(node)
            else:
                _check_local(node)
                maps.update(node.output)
        values = [*graph.value_info, *graph.input, *graph.output]
        return cls(
            model=inferred,
            makers={name: node for node in graph.node for name in node.output},
            pools=pools,
            maps=maps,
            types={value.name: value for value in values},
            constants=constants,
        )

    def nodes_for(self, target: str, done: set[str]) -> list[onnx.NodeProto]:
        """Return the nodes that make a tensor from what is done, the means and constants, in graph order."""
        means = {pool.output[0] for pool in self.pools}
        wanted, pending = set(), [target]
        while pending:
            name = pending.pop()
            node = self.makers.get(name)
            if node is None or name in done or name in means or id(node) in wanted:
                continue
            wanted.add(id(node))
            pending.extend(node.input)
        return [node for node in self.model.graph.node if id(node) in wanted]

    def taken_later(self, done: set[str], pool: onnx.NodeProto | None) -> set[str]:
        """Return the done maps that nodes not done yet (or the poolings after `pool`) take."""
        if pool is None:
            return set()
        position = next(index for index, node in enumerate(self.pools) if node.output[0] == pool.output[0])
        taken = {node.input[0] for node in self.pools[position + 1 :]}
        for node in self.model.graph.node:
            made = [name for name in node.output if name in self.maps]
            if made and not set(made) <= done:
                taken.update(node.input)
        return taken & done


def _stage(
    graph: _Graph,
    nodes: list[onnx.NodeProto],
    target: str,
    pool: onnx.NodeProto | None,
    maps_out: tuple[str, ...],
    done: set[str],
) -> Stage:
    made = {name for node in nodes for name in node.output}
    taken = {name for node in nodes for name in node.input if name and name not in made}
    means = {node.output[0] for node in graph.pools}
    maps_in = tuple(sorted(taken & (done | {INPUT})))
    means_in = tuple(sorted(taken & means))
    outputs = list(maps_out)
    if target not in outputs and target in made:
        outputs.append(target)
    if not nodes:  # the mean of a map that is there already
        nodes = [helper.make_node("Identity", [target], [target + "_again"])]
        maps_in, outputs = (target,), [target + "_again"]
        target = target + "_again"
    initializers = [tensor for name, tensor in graph.constants.items() if name in taken]
    kind = graph.types[pool.input[0]].type.tensor_type.elem_type if pool else TensorProto.FLOAT
    stage = helper.make_graph(
        nodes,
        "stage",
        [_declared(graph, name) for name in (*maps_in, *means_in)],
        [_declared(graph, name) if name in graph.types else _map_value(name, kind) for name in outputs],
        initializers,
    )
    model = helper.make_model(stage, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)
    return Stage(
        model=model,
        maps_in=maps_in,
        means_in=means_in,
        maps_out=maps_out,
        pooled=None if pool is None else target,
        mean=None if pool is None else pool.output[0],
        radius=_radius(nodes, set(maps_in)),
    )


def _declared(graph: _Graph, name: str) -> onnx.ValueInfoProto:
    """Declare a tensor of the original graph with free height and width."""
    known = graph.types[name].type.tensor_type
    channels = known.shape.dim[1].dim_value if len(known.shape.dim) == 4 else 0
    size = ["h", "w"] if name in graph.maps else [1, 1]
    if name == OUTPUT:
        size = ["h_out", "w_out"]
    return helper.make_tensor_value_info(name, known.elem_type, [1, channels or f"{name}_channels", *size])


def _map_value(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [1, f"{name}_channels", "h", "w"])


def _radius(nodes: list[onnx.NodeProto], inputs: set[str]) -> int:
    """Return how far, in input pixels, the nodes look in total."""
    reach: dict[str, Fraction] = {name: Fraction(0) for name in inputs}
    scale: dict[str, int] = dict.fromkeys(inputs, 1)
    for node in nodes:
        known = [name for name in node.input if name in reach]
        if not known:
            continue
        factor = max(scale[name] for name in known)
        most = max(reach[name] for name in known)
        if node.op_type == "Conv":
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            dilation = max(attributes.get("dilations", [1, 1]))
            kernel = max(attributes.get("pads", [0])) * 2 // max(dilation, 1) + 1
            most += Fraction((kernel - 1) // 2 * dilation, factor)
        if node.op_type == "DepthToSpace":
            factor *= next(entry.i for entry in node.attribute if entry.name == "blocksize")
        for name in node.output:
            reach[name], scale[name] = most, factor
    return math.ceil(max(reach.values(), default=Fraction(0)))


def _check_pool(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    if node.op_type == "GlobalAveragePool":
        return
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    axes = attributes.get("axes")
    if len(node.input) > 1 and node.input[1] in constants:
        axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    if axes is None or sorted(axis % 4 for axis in axes) != [2, 3] or attributes.get("keepdims", 1) != 1:
        raise _not_local(node)


def _check_local(node: onnx.NodeProto) -> None:
    if node.op_type in _POINTWISE or node.op_type == "DepthToSpace":
        return
    if node.op_type == "Conv":
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        kernel, pads = attributes.get("kernel_shape"), attributes.get("pads")
        dilations = attributes.get("dilations", [1, 1])
        same = kernel is not None and [(size - 1) // 2 * step for size, step in zip(kernel, dilations, strict=True)] * 2
        if attributes.get("strides", [1, 1]) == [1, 1] and same and list(pads or [0] * 4) == same:
            return
    raise _not_local(node)


def _not_local(node: onnx.NodeProto) -> UsageError:
    return UsageError(
        f"operation {node.op_type} ({node.name or node.output[0]}) cannot be run tile by tile in lock-step",
        expected="same-size convolutions, point-wise operations, pixel shuffles and means over the whole map",
        next_step="use --tiles overlapped",
    )
