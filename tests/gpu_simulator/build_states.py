"""Building with the simulated TensorRT 10 and 11: parser, network, configuration, builder."""

import json
import os
import time
from pathlib import Path
from typing import Any

import onnx

from gpu_simulator import engine_file
from gpu_simulator.bindings import wrap
from gpu_simulator.engine_file import EngineFile, Header
from gpu_simulator.network_states import NetworkState
from gpu_simulator.states import API_STATE, API_USAGE, UNAVAILABLE, Part, error, say

_BUILD = "IBuilder::buildSerializedNetwork"


class LoggerState(Part):
    """trt.Logger: native, prints to standard output."""

    def __init__(self, module: Any, min_severity: Any = None) -> None:
        super().__init__(module)
        self.min_severity = min_severity

    def log(self, severity: Any, message: str) -> None:
        if int(severity) <= int(self.min_severity):
            letter = {"INTERNAL_ERROR": "F"}.get(severity.name, severity.name[0])
            line = f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{letter}] {message}\n"
            os.write(1, line.encode())  # past Python's own buffers, as native code does


class BuilderState(Part):
    """trt.Builder of full TensorRT, which needs a GPU."""

    def __init__(self, module: Any, logger: Any) -> None:
        super().__init__(module)
        self.logger = logger
        self.failed = not self.simulator.gpus
        self.max_threads = 1
        self._cost = 0.0
        if self.failed:
            error(logger, "createInferBuilder", API_STATE, UNAVAILABLE)

    def create_network(self, flags: int) -> Any:
        known = type(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED).__members__.values()
        if flags & ~sum(1 << int(flag) for flag in known):
            error(self.logger, "IBuilder::createNetworkV2", API_USAGE, "unknown flag")
            return None
        return wrap(self.module, "INetworkDefinition", NetworkState(self.module, flags))

    def create_builder_config(self) -> Any:
        return wrap(self.module, "IBuilderConfig", ConfigState(self.module))

    def create_optimization_profile(self) -> Any:
        return wrap(self.module, "IOptimizationProfile", ProfileState(self.module))

    def build_serialized_network(self, network: Any, config: Any, *_: Any) -> Any:
        data = self._build(network._state, config._state)
        return None if data is None else self.module.IHostMemory(data)

    def _build(self, network: NetworkState, config: "ConfigState") -> bytes | None:
        engine = self._engine(network, config)
        if engine is None:
            return None
        shape = engine.header.profiles[-1][engine.input_name][2]
        if not self._steps(config.progress_monitor, len(engine.layers)):
            say(self.logger, "ERROR", "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled")
            return None
        activations = engine.activation_bytes(shape)
        if config.workspace is not None and config.workspace < activations:
            text = f"Could not find any implementation for node {engine.layers[0].name} due to insufficient workspace."
            error(self.logger, _BUILD, "10: Internal Error", text)
            return None
        if activations + engine.weights_bytes > self.simulator.free_bytes(self.simulator.device):
            say(self.logger, "ERROR", f"Requested amount of GPU memory ({activations} bytes) could not be allocated.")
            error(self.logger, _BUILD, "2: OutOfMemory", f"Requested size was {activations} bytes.")
            return None
        for layer in engine.layers:
            say(self.logger, "VERBOSE", f"Layer: {layer.name} Tactic: {layer.tactic} (simulated)")
        say(self.logger, "INFO", f"Total Activation Memory: {activations} bytes")
        say(self.logger, "INFO", f"Total Weights Memory: {engine.weights_bytes} bytes")
        if config.timings is not None:
            config.timings._state.learn(engine)
        return engine.appended_to(b"")

    def _engine(self, network: NetworkState, config: "ConfigState") -> EngineFile | None:
        """Check what a build needs and return the engine it gives."""
        if network.onnx_bytes is None:
            error(self.logger, _BUILD, "4: Internal Error", "Network must have at least one output")
            return None
        name = network.get_input(0)._state.name
        if not config.profiles or any(name not in profile.shapes for profile in config.profiles):
            text = "Network has dynamic or shape inputs, but no optimization profile has been defined."
            error(self.logger, _BUILD, "4: API Usage Error", f"{text} {name} is missing dimensions")
            return None
        gpu = self.simulator.gpus[self.simulator.device]
        header = Header(
            version=self.module.__version__,
            name=network.name,
            profiles=tuple(dict(profile.shapes) for profile in config.profiles),
            capability=gpu.capability,
            gpu=gpu.name,
            compatibility=config.hardware_compatibility_level.name,
            verbosity=config.profiling_verbosity.name,
            resizes_activations="RUNTIME_ACTIVATION_RESIZE_10_10" in config.features,
            flags=tuple(sorted(config.flag_names)),
        )
        engine = EngineFile(header, network.marked_bytes)
        odd = network.odd_type()
        if not network.strongly_typed and odd:
            # Weak typing takes the types of the graph as FP32 unless flags allow others.
            say(self.logger, "WARNING", f"the network is weakly typed: {odd}")
        return engine

    def _steps(self, monitor: Any, count: int) -> bool:
        """Report progress; False when the monitor cancels."""
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, count)
        for step in range(count):
            if self.module.build_step_seconds:
                time.sleep(self.module.build_step_seconds)
            if not monitor.step_complete("Building Engine", step):
                return False
        monitor.phase_finish("Building Engine")
        return True


class ParserState(Part):
    """trt.OnnxParser."""

    def __init__(self, module: Any, network: Any, logger: Any) -> None:
        super().__init__(module)
        self._network, self._logger = network._state, logger
        self._errors: list[tuple[str, str, str]] = []
        self.flags = 0

    def parse(self, data: Any, path: str | None = None) -> bool:
        try:
            model = onnx.load_model_from_string(bytes(data))
        except Exception as error:
            self._errors.append((f"Failed to parse the ONNX model: {error}", "", ""))
            return False
        node = engine_file.unsupported_node(model)
        if node is not None:
            self._errors.append((f"No importer registered for op: {node.op_type}", node.name, node.op_type))
            return False
        self._network.fill(bytes(data), model)
        return True

    def parse_from_file(self, path: str) -> bool:

        return self.parse(Path(path).read_bytes())

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return wrap(self.module, "ParserError", ParserErrorState(self.module, *self._errors[index]))

    def clear_errors(self) -> None:
        self._errors.clear()

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)


class ParserErrorState(Part):
    """trt.ParserError."""

    def __init__(self, module: Any, text: str, name: str, operator: str) -> None:
        super().__init__(module)
        self._text, self._name, self._operator = text, name, operator

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def node(self) -> int:
        return 0

    def code(self) -> Any:
        return self.module.ErrorCode.UNSUPPORTED_NODE


class ConfigState(Part):
    """trt.IBuilderConfig."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.profiles: list[ProfileState] = []
        self.flag_names: set[str] = {"TF32"}
        self.features: set[str] = set()
        self.workspace: int | None = None
        self.timings: Any = None
        self.progress_monitor: Any = None
        self.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.builder_optimization_level = 3
        self.max_aux_streams = -1
        self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
        self.avg_timing_iterations = 1
        self.max_num_tactics = -1
        self.profile_stream = 0
        self.engine_capability = module.EngineCapability.STANDARD
        self.DLA_core = -1
        self.default_device_type = module.DeviceType.GPU
        self.int8_calibrator: Any = None  # TensorRT 10 only, as the next three

    @property
    def flags(self) -> int:
        members = self.module.BuilderFlag.__members__
        return sum(1 << int(members[name]) for name in self.flag_names)

    def set_flag(self, flag: Any) -> None:
        self.flag_names.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flag_names.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self.flag_names

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self.features.add if enable else self.features.discard)(feature.name)

    def get_preview_feature(self, feature: Any) -> bool:
        return feature.name in self.features

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        if pool.name == "WORKSPACE":
            self.workspace = int(size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        whole = self.simulator.gpus[self.simulator.device].memory_bytes
        return self.workspace if pool.name == "WORKSPACE" and self.workspace is not None else whole

    def set_tactic_sources(self, sources: int) -> bool:
        return True

    def get_tactic_sources(self) -> int:
        return 0

    def get_quantization_flag(self, flag: Any) -> bool:
        return False

    def add_optimization_profile(self, profile: Any) -> int:
        if not profile:
            return -1
        self.profiles.append(profile._state)
        return len(self.profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def create_timing_cache(self, data: Any) -> Any:
        return wrap(self.module, "ITimingCache", TimingState(self.module, bytes(data)))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and not cache._state.fits():
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timings


class TimingState(Part):
    """trt.ITimingCache: of one release and one kind of GPU."""

    def __init__(self, module: Any, data: bytes) -> None:
        super().__init__(module)
        self.content: dict[str, Any] = {}
        self._refused = False
        if data:
            try:
                self.content = json.loads(data)
            except ValueError:
                self._refused = True

    def _place(self) -> dict[str, Any]:
        gpu = self.simulator.gpus[self.simulator.device]
        return {"release": self.module.__version__, "gpu": gpu.name}

    def fits(self) -> bool:
        return not self._refused and self.content.get("place", self._place()) == self._place()

    def learn(self, engine: EngineFile) -> None:
        self.content = {**self.content, "place": self._place(), **{layer.name: layer.tactic for layer in engine.layers}}

    def serialize(self) -> Any:
        return self.module.IHostMemory(json.dumps({"place": self._place(), **self.content}).encode())

    def combine(self, other: Any, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and not other._state.fits():
            return False
        self.content = {**other._state.content, **self.content}
        return True

    def reset(self) -> bool:
        self.content = {}
        return True


class ProfileState(Part):
    """trt.IOptimizationProfile: takes any name, and shapes in a wrong order only make it False."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, name: str, low: Any, middle: Any, high: Any) -> None:
        self.shapes[name] = (tuple(low), tuple(middle), tuple(high))

    def get_shape(self, name: str) -> list[tuple[int, ...]]:
        return list(self.shapes[name])

    def __bool__(self) -> bool:
        ordered = (
            len(low) == len(middle) == len(high)
            and all(0 < a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
            for low, middle, high in self.shapes.values()
        )
        return all(ordered)
