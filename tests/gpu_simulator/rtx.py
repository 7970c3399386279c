"""TensorRT-RTX: its real ahead-of-time builder runs, and the graph is appended to the engine it builds.

A real engine of TensorRT-RTX can only be opened on a GPU. The simulated runtime reads the graph behind it instead.
"""

from typing import Any

import onnx

from gpu_simulator.engine_file import EngineFile, Header, with_outputs

_REAL: dict[str, Any] = {}


def keep_graphs(module: Any, real: Any) -> None:
    """Make the real parser, profiles and builder remember what the simulated runtime needs."""
    if not _REAL:
        _REAL["parse"] = real.OnnxParser.parse
        _REAL["init"] = real.OnnxParser.__init__
        _REAL["set_shape"] = real.IOptimizationProfile.set_shape
        _REAL["add"] = real.IBuilderConfig.add_optimization_profile
        _REAL["build"] = real.Builder.build_serialized_network

    networks: dict[int, Any] = {}
    graphs: dict[int, bytes] = {}
    shapes: dict[int, dict[str, Any]] = {}
    profiles: dict[int, list[dict[str, Any]]] = {}

    def init(self: Any, network: Any, logger: Any) -> None:
        _REAL["init"](self, network, logger)
        networks[id(self)] = network

    def parse(self: Any, model: Any, path: Any = None) -> bool:
        done = bool(_REAL["parse"](self, model) if path is None else _REAL["parse"](self, model, path))
        if done:
            graphs[id(networks[id(self)])] = bytes(model)
        return done

    def set_shape(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = _REAL["set_shape"](self, *args, **kwargs)
        names = ("input", "min", "opt", "max")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        shapes.setdefault(id(self), {})[bound["input"]] = tuple(tuple(bound[name]) for name in names[1:])
        return done

    def add(self: Any, profile: Any) -> int:
        index = int(_REAL["add"](self, profile))
        if index >= 0:
            profiles.setdefault(id(self), []).append(dict(shapes.get(id(profile), {})))
        return index

    def build(self: Any, network: Any, config: Any, *rest: Any) -> Any:
        memory = _REAL["build"](self, network, config, *rest)
        if memory is None:
            return None
        header = Header(
            version=module.__version__,
            name=network.name,
            profiles=tuple(profiles.get(id(config), ())),
            capability=None,
            gpu=None,
            verbosity=config.profiling_verbosity.name,
            resizes_activations=True,
        )
        graph = with_outputs(graphs[id(network)], _outputs(network, graphs[id(network)]))
        return module.IHostMemory(EngineFile(header, graph).appended_to(bytes(memory)))

    real.OnnxParser.__init__ = init
    real.OnnxParser.parse = parse
    real.IOptimizationProfile.set_shape = set_shape
    real.IBuilderConfig.add_optimization_profile = add
    real.Builder.build_serialized_network = build


def _outputs(network: Any, graph: bytes) -> list[str]:
    """Return the marked outputs that the ONNX graph has too; the parser adds tensors of its own."""
    known = {name for node in onnx.load_model_from_string(graph).graph.node for name in node.output}
    return [name for index in range(network.num_outputs) if (name := network.get_output(index).name) in known]
