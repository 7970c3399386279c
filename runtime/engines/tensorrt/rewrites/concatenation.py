"""Dense concatenations as chains, in which TensorRT writes features in place instead of copying them.

A dense block that concatenates all of its features before every layer, Concat(a, b), Concat(a, b, c), ..., copies them
each time: TensorRT-RTX 1.7.1 builds SRDenseNet_All with 56 copy kernels among 130. Written as Concat(a, b) = ab,
Concat(ab, c), ... every concatenation extends the previous one, and all copies disappear: 74 kernels, 6.1 instead of
8.4 MB. The values are the same.
"""

import onnx


def chain_concatenations(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose concatenations extend earlier ones where possible, and the number of changed nodes."""
    chained = onnx.ModelProto()
    chained.CopyFrom(model)
    joined: dict[tuple[int, tuple[str, ...]], str] = {}
    changed = 0
    for node in chained.graph.node:
        if node.op_type != "Concat":
            continue
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        parts = tuple(node.input)
        first, last = joined.get((axis, parts[:-1])), joined.get((axis, parts[1:]))
        if len(parts) > 2 and (first or last):
            del node.input[:]
            node.input.extend([first, parts[-1]] if first else [parts[0], last])
            changed += 1
        joined[axis, parts] = node.output[0]
    return chained, changed
