"""A model for Triton's Python backend that runs model.onnx with ONNX Runtime: in place of the backend of that name."""

from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as backend


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        model = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        images = [backend.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        outputs = [self._session.run(["output"], {"input": image})[0] for image in images]
        return [backend.InferenceResponse([backend.Tensor("output", output)]) for output in outputs]
