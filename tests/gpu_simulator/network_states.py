"""A parsed network of the simulated TensorRT 10 and 11: its layers and tensors, and what is marked as an output."""

from typing import Any

import onnx

from gpu_simulator import engine_file
from gpu_simulator.bindings import NotSimulatedError, wrap
from gpu_simulator.states import Part

_LAYERS = {
    "ACTIVATION": ("Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "Clip", "Elu", "Tanh"),
    "CAST": ("Cast",),
    "CONCATENATION": ("Concat",),
    "CONSTANT": ("Constant",),
    "CONVOLUTION": ("Conv",),
    "DECONVOLUTION": ("ConvTranspose",),
    "DEQUANTIZE": ("DequantizeLinear",),
    "ELEMENTWISE": ("Add", "Sub", "Mul", "Div", "Min", "Max"),
    "IDENTITY": ("Identity",),
    "MATRIX_MULTIPLY": ("MatMul", "Gemm"),
    "PARAMETRIC_RELU": ("PRelu",),
    "QUANTIZE": ("QuantizeLinear",),
    "REDUCE": ("ReduceMean", "GlobalAveragePool"),
    "SHAPE": ("Shape",),
    "SHUFFLE": ("DepthToSpace", "Reshape", "Transpose", "Flatten"),
    "SLICE": ("Slice", "Split", "Pad"),
    "UNARY": ("Sqrt", "Exp", "Neg", "Abs"),
}
_KIND = {operator: kind for kind, operators in _LAYERS.items() for operator in operators}


class NetworkState(Part):
    """trt.INetworkDefinition: what a parser put in; one layer per ONNX node."""

    def __init__(self, module: Any, flags: int) -> None:
        super().__init__(module)
        self.flags = flags
        self.name = "Unnamed Network 0"
        self.onnx_bytes: bytes | None = None
        self.outputs: list[str] = []
        self._model: Any = None
        self._types: dict[str, str] = {}
        strong = module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.strongly_typed = bool(flags & (1 << int(strong))) or not module.__version__.startswith("10.")

    def fill(self, data: bytes, model: Any) -> None:
        """Take what a parser has read."""
        self.onnx_bytes, self._model = data, model
        self.outputs = [value.name for value in model.graph.output]
        self._types = engine_file.tensor_types(model)

    @property
    def marked_bytes(self) -> bytes:
        """The graph with the outputs that are marked now."""
        assert self.onnx_bytes is not None
        return engine_file.with_outputs(self.onnx_bytes, self.outputs)

    def odd_type(self) -> str | None:
        """Return the types of the weights."""
        kinds = {tensor.data_type for tensor in self._model.graph.initializer}
        return ", ".join(sorted(engine_file.TYPE_NAMES.get(kind, "?") for kind in kinds))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    @property
    def _inputs(self) -> list[str]:
        constants = {tensor.name for tensor in self._model.graph.initializer}
        return [value.name for value in self._model.graph.input if value.name not in constants]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs) if self._model else 0

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node) if self._model else 0

    def __len__(self) -> int:
        return self.num_layers

    def get_input(self, index: int) -> Any:
        return self.tensor(self._inputs[index])

    def get_output(self, index: int) -> Any:
        return self.tensor(self.outputs[index])

    def get_layer(self, index: int) -> Any:
        return wrap(self.module, "ILayer", LayerState(self, self._model.graph.node[index]))

    def __getitem__(self, index: int) -> Any:
        if index >= self.num_layers:
            raise IndexError("Out of bounds")
        return self.get_layer(index)

    def mark_output(self, tensor: Any) -> None:
        if tensor.name not in self.outputs:
            self.outputs.append(tensor.name)

    def unmark_output(self, tensor: Any) -> None:
        self.outputs.remove(tensor.name)

    def tensor(self, name: str) -> Any:
        """Return a tensor by name."""
        return wrap(self.module, "ITensor", TensorState(self, name))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an input, with -1; inner tensors are not asked for theirs."""
        value = next((value for value in self._model.graph.input if value.name == name), None)
        if value is None:
            raise NotSimulatedError(f"the shape of {name}")
        return engine_file.shape_of(value)

    def type_of(self, name: str) -> Any:
        """Return the type of a tensor."""
        return getattr(self.module.DataType, self._types[name])

    def is_input(self, name: str) -> bool:
        """Return True for an input of the network."""
        return name in self._inputs


class LayerState(Part):
    """trt.ILayer: an ONNX node."""

    def __init__(self, network: NetworkState, node: onnx.NodeProto) -> None:
        super().__init__(network.module)
        self._network, self._node = network, node
        if node.op_type not in _KIND:
            raise NotSimulatedError(f"a layer for {node.op_type}")
        self.type = getattr(network.module.LayerType, _KIND[node.op_type])
        self.name = node.name
        self.precision_is_set = False
        self.num_inputs, self.num_outputs = len(node.input), len(node.output)

    def get_input(self, index: int) -> Any:
        return self._network.tensor(self._node.input[index])

    def get_output(self, index: int) -> Any:
        return self._network.tensor(self._node.output[index])


class TensorState(Part):
    """trt.ITensor of a network."""

    def __init__(self, network: NetworkState, name: str) -> None:
        super().__init__(network.module)
        self._network = network
        self.name = name
        self.is_shape_tensor = False

    @property
    def dtype(self) -> Any:
        return self._network.type_of(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._network.shape_of(self.name)

    @property
    def is_network_input(self) -> bool:
        return self._network.is_input(self.name)

    @property
    def is_network_output(self) -> bool:
        return self.name in self._network.outputs
