"""Which state stands behind which class of the simulated TensorRT.

Classes and signatures come from the real bindings (`bindings`); attributes and methods of the states bear TensorRT's
names. TensorRT-RTX keeps its real builder (`rtx`).
"""

from gpu_simulator import build_states as build
from gpu_simulator import network_states as network
from gpu_simulator import run_states as run
from gpu_simulator.context_state import ContextState

FULL_STATES = {
    "Logger": build.LoggerState,
    "Builder": build.BuilderState,
    "INetworkDefinition": network.NetworkState,
    "ILayer": network.LayerState,
    "ITensor": network.TensorState,
    "OnnxParser": build.ParserState,
    "ParserError": build.ParserErrorState,
    "IBuilderConfig": build.ConfigState,
    "ITimingCache": build.TimingState,
    "IOptimizationProfile": build.ProfileState,
    "Runtime": run.RuntimeState,
    "ICudaEngine": run.EngineState,
    "IRuntimeConfig": run.RuntimeConfigState,
    "IExecutionContext": ContextState,
    "EngineInspector": run.InspectorState,
}
_RUNTIME = ("Runtime", "ICudaEngine", "IRuntimeConfig", "IExecutionContext", "EngineInspector")
RTX_STATES = {name: FULL_STATES[name] for name in _RUNTIME} | {
    "IRuntimeCache": run.RuntimeCacheState,
    "IHostMemory": None,
}
FULL_FUNCTIONS = {"init_libnvinfer_plugins": lambda logger, namespace: True}
