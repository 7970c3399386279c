"""Opening engines with the simulated TensorRT: runtime, engine, runtime configuration, runtime cache, inspector."""

import json
from typing import Any

from gpu_simulator import engine_file
from gpu_simulator.bindings import wrap
from gpu_simulator.context_state import ContextState
from gpu_simulator.cuda import SimulatedOutOfMemoryError
from gpu_simulator.engine_file import EngineFile, Header
from gpu_simulator.states import API_STATE, API_USAGE, CUDA, SERIALIZATION, UNAVAILABLE, Part, error, say

_DESERIALIZE = "IRuntime::deserializeCudaEngine"


class RuntimeState(Part):
    """trt.Runtime."""

    def __init__(self, module: Any, logger: Any) -> None:
        super().__init__(module)
        self.logger = logger
        self.failed = not self.simulator.gpus
        self.engine_host_code_allowed = False
        self.max_threads = 1
        self.temporary_directory = ""
        self.defer_weights_loading = False
        if self.failed:
            error(logger, "createInferRuntime", API_STATE, UNAVAILABLE)

    @property
    def engine_header_size(self) -> int:
        return 64

    def get_engine_validity(self, data: Any) -> tuple[Any, int]:
        validity = self.module.EngineValidity
        found = engine_file.read(data) if len(data) > 64 else None
        if found is None and bytes(data[:4]) != b"vtrt":
            return validity.INVALID, int(self.module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        return validity.VALID, 0

    def deserialize_cuda_engine(self, data: Any) -> Any:
        found = engine_file.read(bytes(data))
        if found is None:
            error(self.logger, _DESERIALIZE, SERIALIZATION, "Magic tag does not match")
            return None
        version = found.header.version
        if version != self.module.__version__:
            text = "Version tag does not match. The engine plan file is not compatible with this version of TensorRT"
            text += f", expecting library version {self.module.__version__} got {version}, please rebuild."
            error(self.logger, _DESERIALIZE, SERIALIZATION, text)
            return None
        gpu = self.simulator.gpus[self.simulator.device]
        if not self._runs_on(found.header, gpu.capability):
            here, built = (".".join(map(str, pair or ())) for pair in (gpu.capability, found.header.capability))
            text = "The engine plan file is generated on an incompatible device, expecting compute"
            error(self.logger, _DESERIALIZE, API_STATE, f"{text} {here} got compute {built}, please rebuild.")
            return None
        try:
            weights = self.simulator.allocate(found.weights_bytes, self.simulator.device)
        except SimulatedOutOfMemoryError:
            text = f"Requested amount of GPU memory ({found.weights_bytes} bytes) could not be allocated."
            say(self.logger, "ERROR", text)
            error(self.logger, _DESERIALIZE, CUDA, "CUDA error: out of memory")
            return None
        state = EngineState(self, found, weights)
        return wrap(self.module, "ICudaEngine", state)

    def _runs_on(self, header: Header, capability: tuple[int, int]) -> bool:
        if header.capability is None or header.capability == capability:
            return True
        if header.compatibility == "AMPERE_PLUS":
            return capability >= (8, 0)
        return header.compatibility == "SAME_COMPUTE_CAPABILITY" and header.capability == capability


class EngineState(Part):
    """trt.ICudaEngine."""

    def __init__(self, runtime: RuntimeState, found: EngineFile, weights: Any) -> None:
        super().__init__(runtime.module)
        self.logger = runtime.logger
        self.file, self.device = found, self.simulator.device
        self._weights = weights
        self._runtime = runtime.handle()  # the bindings keep the runtime alive as long as its engine
        self.name = found.header.name
        self.num_io_tensors = len(found.tensors)
        self.num_optimization_profiles = len(found.header.profiles)
        self.num_layers = len(found.layers)
        self.num_aux_streams = 0
        self.refittable = False
        self.hardware_compatibility_level = getattr(self.module.HardwareCompatibilityLevel, found.header.compatibility)
        self.profiling_verbosity = getattr(self.module.ProfilingVerbosity, found.header.verbosity)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(i) for i in range(self.num_optimization_profiles))

    device_memory_size = device_memory_size_v2

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.file.activation_bytes(self.file.header.profiles[index][self.file.input_name][2])

    get_device_memory_size_for_profile = get_device_memory_size_for_profile_v2

    def _tensor(self, name: str) -> tuple[bool, str, tuple[int, ...]] | None:
        found = self.file.tensors.get(name)
        if found is None:
            error(self.logger, "ICudaEngine", API_USAGE, f"Given invalid tensor name: {name}.")
        return found

    def get_tensor_name(self, index: int) -> str:
        return list(self.file.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        found, modes = self._tensor(name), self.module.TensorIOMode
        return modes.NONE if found is None else modes.INPUT if found[0] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        found = self._tensor(name)
        return getattr(self.module.DataType, found[1] if found else "FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        found = self._tensor(name)
        return found[2] if found else ()

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.DEVICE

    def get_tensor_format(self, name: str, *_: int) -> Any:
        return self.module.TensorFormat.LINEAR

    def get_tensor_format_desc(self, name: str, *_: int) -> str:
        return f"Row major linear {self.get_tensor_dtype(name).name} format"

    def get_tensor_vectorized_dim(self, name: str, *_: int) -> int:
        return -1

    def get_tensor_components_per_element(self, name: str, *_: int) -> int:
        return -1

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        if not 0 <= index < self.num_optimization_profiles:
            return []
        return list(self.file.header.profiles[index].get(name, ()))

    def create_runtime_config(self) -> Any:
        return wrap(self.module, "IRuntimeConfig", RuntimeConfigState(self.module))

    def create_execution_context(self, how: Any = None) -> Any:
        config = how._state if how is not None and hasattr(how, "_state") else None
        strategy = config.strategy if config else how if how is not None else None
        name = getattr(strategy, "name", "STATIC")
        if self.simulator.device != self.device:
            raise self.simulator.violation(f"a context of device {self.device} is made on {self.simulator.device}")
        try:
            state = ContextState(self, config, name)
        except SimulatedOutOfMemoryError:
            error(self.logger, "ICudaEngine::createExecutionContext", CUDA, "CUDA error: out of memory")
            return None
        return wrap(self.module, "IExecutionContext", state)

    def create_engine_inspector(self) -> Any:
        return wrap(self.module, "EngineInspector", InspectorState(self))

    def serialize(self) -> Any:
        return self.module.IHostMemory(self.file.appended_to(b""))

    def released(self) -> None:
        self.simulator.release(self._weights)


class RuntimeConfigState(Part):
    """trt.IRuntimeConfig, with what only TensorRT-RTX has."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.strategy = module.ExecutionContextAllocationStrategy.STATIC
        self.cache: Any = None
        if hasattr(module, "CudaGraphStrategy"):
            self.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy

    def create_runtime_cache(self) -> Any:
        return wrap(self.module, "IRuntimeCache", RuntimeCacheState(self.module))

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> Any:
        return self.cache


class RuntimeCacheState(Part):
    """trt.IRuntimeCache of TensorRT-RTX: of one release and GPU; other data is refused and changes nothing."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        gpu = self.simulator.gpus[self.simulator.device]
        self._place = f"{module.__version__}|{gpu.name}"
        self.shapes: set[str] = set()

    def serialize(self) -> Any:
        return self.module.IHostMemory(json.dumps([self._place, sorted(self.shapes)]).encode())

    def deserialize(self, data: Any) -> bool:
        try:
            place, shapes = json.loads(bytes(data))
        except ValueError:
            return False
        if place != self._place:
            return False
        self.shapes = set(shapes)
        return True

    def reset(self) -> bool:
        self.shapes.clear()
        return True


_LABELS = {"FLOAT": "FP32", "HALF": "FP16"}
_SHORT = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "INT8": "Int8", "FP8": "FP8", "INT64": "Int64",
          "INT32": "Int32", "BOOL": "Bool", "UINT8": "UInt8"}  # fmt: skip
_UNKNOWN = "N/A due to dynamic shapes"


class InspectorState(Part):
    """trt.EngineInspector: JSON as TensorRT documents it; formats are known once shapes are."""

    def __init__(self, engine: EngineState) -> None:
        super().__init__(engine.module)
        self._engine, self._file = engine, engine.file
        self._kept = engine.handle()
        self.execution_context: Any = None

    def get_engine_information(self, form: Any) -> str:
        verbosity = self._file.header.verbosity
        layers: list[Any]
        if verbosity == "NONE":
            layers = []
        elif verbosity == "LAYER_NAMES_ONLY":
            layers = [layer.name for layer in self._file.layers]
        else:
            layers = [self._layer(layer) for layer in self._file.layers]
        old = self.module.__version__.startswith("10.")
        names = list(self._file.tensors)
        tail: dict[str, Any] = {"Bindings": names} if old else {"I/O Tensors": [{"Name": name} for name in names]}
        document = {"Layers": layers, **tail}
        return json.dumps(document, indent=1) if form.name == "JSON" else "\n".join(map(str, layers))

    def get_layer_information(self, index: int, form: Any) -> str:
        return json.dumps(self._layer(self._file.layers[index]))

    def _layer(self, layer: Any) -> dict[str, Any]:
        weights: dict[str, Any] = {}
        if layer.weights:
            weights = {
                "ParameterType": layer.parameter,
                "Weights": {"Type": _SHORT[layer.weights], "Count": layer.weight_count},
            }
        return {
            "Name": layer.name,
            "LayerType": layer.kind,
            "Inputs": [self._tensor(name, layer.reads) for name in layer.inputs],
            "Outputs": [self._tensor(name, layer.writes) for name in layer.outputs],
            **weights,
            "TacticName": layer.tactic,
            "StreamId": 0,
            "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in layer.nodes),
        }

    def _tensor(self, name: str, kind: str) -> dict[str, Any]:
        context = self.execution_context
        shape = context._state._shape if context is not None else None
        sizes = self._file.inferred(shape)[0].get(name, ()) if shape else [-1, -1, -1, -1]
        base = {"Name": name, "Location": "Device", "Dimensions": list(sizes)}
        known = shape is not None or "inspector-without-shapes" in self.simulator.tolerated
        dense = f"Channel major {_LABELS.get(kind, kind)} format where channel % 8 == 0"
        if self.module.__version__.startswith("10."):
            return {**base, "Format/Datatype": dense if known else _UNKNOWN}
        return {**base, "Format": "Channel major" if known else _UNKNOWN, "Datatype": _SHORT[kind]}
