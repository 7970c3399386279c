"""Load an ONNX file as chaiNNer's ONNX nodes do, with the packages that they use.

chainner_load.py NETWORK INPUT OUTPUT: arrays are .npy files, (1, C, H, W) float32. The scale is found by strict shape
inference at one size; files without it are run without knowing their scale.
"""

import json
import sys

import numpy as np
import onnx
import onnxruntime

network, source, output = sys.argv[1:]
model = onnx.load(network)
shape = model.graph.input[0].type.tensor_type.shape
channels = shape.dim[1].dim_value
for dimension, size in zip(shape.dim, (1, channels, 16, 16), strict=True):
    dimension.dim_value = size
inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type.shape
session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
np.save(output, session.run(None, {session.get_inputs()[0].name: np.load(source)})[0])
scale = inferred.dim[2].dim_value // 16
print(json.dumps({"channels": channels, "scale": scale, "type": session.get_inputs()[0].type}))
