"""Where 8-bit values go: one recipe per kind of network and target engine, as data that can be printed and searched.

What all targets have in common: the *inputs* of convolutions are quantized, their outputs are not, so that convolution,
bias and ReLU stay one kernel and the next reader's quantization fuses into it; channel attention (pooling, its two 1x1
convolutions, sigmoid and gate) stays float, as it works on 1x1 maps and steers every channel; nothing is quantized
after the last convolution, where one step of 255 would already be visible.

A dense network concatenates features that each have a range of their own. Quantizing every concatenation anew costs a
pass over hundreds of channels per layer. With `share`, each feature is quantized once where it is made, with one scale
for all that meet in a concatenation, so that the concatenation moves bytes; equalization
(rewrites/equalize.py) makes that scale fit all of them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from srdeploy.calibration.int8.arithmetic import Kind
from srdeploy.calibration.int8.qdq import Site
from srdeploy.core.onnx_graph import Graph, Layer
from srdeploy.core.precision import Precision, Target


@dataclass(frozen=True)
class Recipe:
    """The layout of 8-bit graphs for one target.

    Attributes:
        kind: type of activations.
        half: the float part and all scales are FP16.
        deconvolution: "int8" (weights per output channel on axis 1), "float" or "rewrite" (exact convolutions and a
            pixel shuffle, see rewrites/deconvolution.py).
        merge_tail: replace the linear end of the network by one layer (see core/tail.py).
        quantize_first, quantize_last: whether the layers that read and write the image are quantized.
        min_channels: layers with fewer input or output channels stay float.
        quantize_outputs: quantize the outputs of layers too; the engine computes a layer with integers only then.
        concat_pairs: add a Q/DQ pair of the same scale after a shared concatenation. It changes no number: the engine
            expects the pair directly before the convolution and moves it through the concatenation.
        quantize_before_shuffle: quantize the input of a pixel shuffle instead of its output, where quantization fuses
            with the convolution and the shuffle moves bytes.
        reader_scales: give each reader of a residual stream its own scale per channel (see
            rewrites/streams.py); the engine multiplies while it quantizes.
        allow_splits: allow a layer to run as two 8-bit convolutions, where these are faster than one float
            convolution.
        weight_bits: 8, or 7 for weights within +-64, which processors without VNNI need.
        why: reason to report for each decision.
    """

    kind: Kind
    half: bool
    deconvolution: str
    merge_tail: bool
    quantize_first: bool
    quantize_last: bool
    min_channels: int
    quantize_outputs: bool
    concat_pairs: bool
    quantize_before_shuffle: bool
    reader_scales: bool
    allow_splits: bool
    why: Mapping[str, str]
    weight_bits: int = 8


_TENSORRT = Recipe(
    kind="int8",
    half=True,
    deconvolution="float",
    merge_tail=False,  # not measured on GPUs
    quantize_first=False,
    quantize_last=False,
    min_channels=16,
    quantize_outputs=False,
    concat_pairs=True,
    quantize_before_shuffle=False,
    reader_scales=False,  # not measured on GPUs
    allow_splits=False,  # INT8 is twice as fast as FP16: two passes would gain nothing
    why={
        "deconvolution": "TensorRT generations disagree about INT8 deconvolutions with scales per channel",
        "first": "too few input channels for INT8 tensor cores",
        "last": "too few output channels for INT8 tensor cores, and its error is the image's error",
        "min_channels": "fewer than 16 channels do not fill an INT8 tensor core",
    },
)
RECIPES: dict[Target, Recipe] = {
    Target.TENSORRT: _TENSORRT,
    Target.TENSORRT_RTX: _TENSORRT,
    # uint8, because signed int8 behind a concatenation is computed wrongly, in silence, by OpenVINO 2026.4 on the CPU.
    Target.OPENVINO: Recipe(
        kind="uint8",
        half=False,
        deconvolution="int8",
        merge_tail=True,
        quantize_first=True,
        quantize_last=True,
        min_channels=1,
        quantize_outputs=False,
        concat_pairs=False,
        quantize_before_shuffle=True,
        reader_scales=True,
        allow_splits=True,
        why={},
    ),
    Target.ONNXRUNTIME: Recipe(
        kind="uint8",
        half=False,
        deconvolution="rewrite",
        merge_tail=True,
        quantize_first=True,
        quantize_last=False,
        min_channels=1,
        quantize_outputs=True,
        concat_pairs=True,
        quantize_before_shuffle=True,
        reader_scales=False,  # passes of their own: 5 % slower for 1.1 dB, which one float layer buys as cheaply
        allow_splits=False,  # the second half would have to be quantized at its output, which is what splitting avoids
        why={
            "chained": "its output is read by the residual stream in full precision, and integer kernels round theirs",
            "last": "integer kernels need a quantized output, and that would be the image",
        },
    ),
}


@dataclass(frozen=True)
class Placement:
    """Which layers and activations become 8-bit, and why the others do not.

    Attributes:
        layers: names of the quantized layers.
        sites: the activations they read.
        floats: layer name -> reason, for all layers that stay float.
    """

    layers: tuple[str, ...]
    sites: tuple[Site, ...]
    floats: Mapping[str, str]


def place(
    graph: Graph,
    recipe: Recipe,
    *,
    precision: Precision = Precision.INT8,
    keep: Mapping[str, str] | None = None,
    share: bool = True,
    splits: Collection[str] = (),
) -> Placement:
    """Decide the placement of Q/DQ pairs.

    Args:
        graph: the float graph.
        recipe: the target's.
        precision: INT8 or FP8, which asks for more channels.
        keep: layers to leave float, with the reason.
        share: quantize what meets in a concatenation once, with one scale, instead of every concatenation anew.
        splits: layers that will be split, and so need the float value of what they read.
    """
    floats = {layer.name: reason for layer in graph.layers if (reason := _float_reason(layer, recipe, precision))}
    if recipe.quantize_outputs:
        floats |= {
            layer.name: recipe.why["chained"]
            for layer in graph.layers
            if layer.name not in floats and _feeds_stream(graph, layer)
        }
    floats |= dict(keep or {})
    chosen = [layer for layer in graph.layers if layer.name not in floats]
    nodes = {layer.node for layer in chosen}
    sources = {layer.input: _source(graph, layer, recipe, nodes, splits) for layer in chosen}
    joined = [*sources.values(), *(_joins(graph, chosen) if recipe.quantize_outputs else [])]
    groups = _concat_leaves(graph, joined) if share else {}
    readers: dict[str, list[str]] = {}
    for layer in chosen:
        source = sources[layer.input]
        if not (share and _is_concat(graph, source)):
            readers.setdefault(source, []).append(
                layer.node if source == layer.input else graph.consumers[source][0].name
            )
    for leaf in groups:
        readers[leaf] = [n.name for n in graph.consumers[leaf] if n.op_type == "Concat" or n.name in nodes]
    if recipe.concat_pairs:
        for tensor, source in sources.items():
            if tensor != source:  # bytes were moved: the pair in front of the convolution changes no number
                readers[tensor] = [node.name for node in graph.consumers[tensor]]
                leaf = _leaves(graph, source)[0] if share else source
                groups[tensor] = groups.get(leaf, leaf)
    if recipe.quantize_outputs:
        for layer in chosen:
            for tensor in _outputs(graph, layer):
                readers.setdefault(tensor, [node.name for node in graph.consumers[tensor]])
    if recipe.concat_pairs:
        for tensor in [name for name in graph.producer if _is_concat(graph, name)]:
            leaves = _leaves(graph, tensor)
            if share and leaves[0] in groups:
                readers[tensor] = [node.name for node in graph.consumers[tensor]]
                groups[tensor] = groups[leaves[0]]
    order = [*(value.name for value in graph.model.graph.input), *graph.producer]
    sites = tuple(Site(t, tuple(readers[t]), groups.get(t, t)) for t in order if t in readers)
    return Placement(tuple(layer.name for layer in chosen), sites, floats)


def list_quantizable(graph: Graph, recipe: Recipe, precision: Precision) -> tuple[str, ...]:
    """Return the activations that may become 8-bit: inputs of layers, and the features behind concatenations."""
    wide = place(graph, recipe, precision=precision, share=False)
    deep = place(graph, recipe, precision=precision, share=True)
    split = place(graph, recipe, precision=precision, splits=deep.layers)
    sites = (*deep.sites, *wide.sites, *split.sites)
    return tuple(dict.fromkeys(site.tensor for site in sites if not _is_concat(graph, site.tensor)))


def list_plain_convolutions(graph: Graph, recipe: Recipe, precision: Precision, *, share: bool = True) -> list[Layer]:
    """Return the plain convolutions that become 8-bit where nothing is kept float; `share` as for `place`."""
    names = place(graph, recipe, precision=precision, share=share).layers
    return [layer for layer in graph.layers if layer.name in names and graph.is_plain_convolution(layer)]


def can_split(graph: Graph, layer: Layer) -> bool:
    """Return True if a layer can be computed as two 8-bit convolutions: its input must exist as floats.

    What meets in a concatenation exists in 8 bits only, and the first layer reads an image that is exact in 8 bits.
    """
    return layer.op == "Conv" and layer.role in ("trunk", "last") and not _is_concat(graph, layer.input)


def macs_share_of(graph: Graph, names: Collection[str]) -> float:
    """Return the share of the multiply-adds that some layers have, 0..1."""
    total = sum(layer.macs for layer in graph.layers)
    return sum(layer.macs for layer in graph.layers if layer.name in names) / total if total else 0.0


def _float_reason(layer: Layer, recipe: Recipe, precision: Precision) -> str | None:
    narrow = min(layer.channels_in, layer.channels_out)
    if layer.role == "attention":
        return "channel attention works on 1x1 maps and steers every channel"
    if layer.role == "edge":
        return "it corrects the outermost pixels of the image: a thin strip, whose time does not matter"
    if layer.role == "first" and not recipe.quantize_first:
        return recipe.why["first"]
    if layer.role == "last" and not recipe.quantize_last:
        return recipe.why["last"]
    if precision == Precision.FP8 and (layer.op != "Conv" or narrow <= 16):
        return "FP8 convolutions exist for more than 16 channels only, and not as deconvolutions"
    if layer.op == "ConvTranspose" and recipe.deconvolution == "float":
        return recipe.why.get("deconvolution", "asked for")
    if narrow < recipe.min_channels:
        return recipe.why["min_channels"]
    return None


def _feeds_stream(graph: Graph, layer: Layer) -> bool:
    readers = graph.consumers.get(layer.output, [])
    return len(readers) > 1 and any(node.op_type == "Add" for node in readers)


def _outputs(graph: Graph, layer: Layer) -> list[str]:
    """Return what has to be quantized for a layer to end in integers: behind its ReLU, and behind a pixel shuffle."""
    tensor = layer.output
    reader = graph.only_consumer(tensor)
    if reader is not None and reader.op_type == "Relu":
        tensor = reader.output[0]
        reader = graph.only_consumer(tensor)
    if tensor not in graph.consumers:
        return []
    if reader is not None and reader.op_type == "DepthToSpace":
        return [tensor, reader.output[0]]
    return [tensor]


def _joins(graph: Graph, chosen: Collection[Layer]) -> list[str]:
    """Return the concatenations that quantized outputs of layers meet in, whoever reads them."""
    readers = (graph.only_consumer(tensor) for layer in chosen for tensor in _outputs(graph, layer))
    return [node.output[0] for node in readers if node is not None and node.op_type == "Concat"]


def _is_concat(graph: Graph, tensor: str) -> bool:
    node = graph.producer.get(tensor)
    return node is not None and node.op_type == "Concat"


def _source(graph: Graph, layer: Layer, recipe: Recipe, nodes: Collection[str], splits: Collection[str]) -> str:
    """Return the tensor that is quantized for a layer: what it reads, or what a pixel shuffle in front of it reads.

    A shuffle is passed when only layers that take 8 bits read it, and nothing else reads what it reads.
    """
    tensor = layer.input
    node = graph.producer.get(tensor)
    readers = graph.consumers[tensor]
    split = any(other.name in splits for other in graph.layers if other.input == tensor)
    if not recipe.quantize_before_shuffle or split or node is None or node.op_type != "DepthToSpace":
        return tensor
    alone = all(reader.name in nodes for reader in readers) and graph.only_consumer(node.input[0]) is node
    return node.input[0] if alone else tensor


def _concat_leaves(graph: Graph, sources: Collection[str]) -> dict[str, str]:
    """Return the features behind the concatenations among `sources`: tensor -> name of its group.

    Features of two concatenations that share one are one group: its scale has to fit both.
    """
    group: dict[str, str] = {}
    for source in sources:
        if not _is_concat(graph, source):
            continue
        leaves = _leaves(graph, source)
        met = {group[leaf] for leaf in leaves if leaf in group}
        name = min(met) if met else leaves[0]
        for leaf, old in list(group.items()):
            if old in met:
                group[leaf] = name
        group |= dict.fromkeys(leaves, name)
    return group


def _leaves(graph: Graph, tensor: str) -> list[str]:
    found: dict[str, None] = {}
    pending = [tensor]
    while pending:
        name = pending.pop()
        node = graph.producer.get(name)
        if node is not None and node.op_type == "Concat":
            pending.extend(reversed(node.input))
        else:
            found[name] = None
    return list(found)
