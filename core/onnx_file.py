"""ONNX files on disk: the one function that reads them, with their external weights, hash and contract."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from srdeploy.core.contract import INPUT, OUTPUT, PREFIX, ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.onnx_graph import Graph, add_outputs
from srdeploy.core.shapes import TensorSpec


class GraphFile(Graph):
    """The graph of an ONNX file written by srdeploy, read once.

    Attributes:
        path: the file.
        sha256: of the file, or of the file and its external data together.
        contract: what the outside may rely on.
    """

    def __init__(self, model: onnx.ModelProto, *, path: Path, sha256: str, contract: ModelContract) -> None:
        super().__init__(model)
        self.path = path
        self.sha256 = sha256
        self.contract = contract

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, without initializers."""
        return tuple(_spec(value) for value in self.model.graph.input if value.name not in self.initializers)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs."""
        return tuple(_spec(value) for value in self.model.graph.output)

    def serialized(self, *, extra_outputs: Sequence[str] = ()) -> bytes:
        """Return the graph with its weights as one protobuf, with inner tensors added as outputs if requested.

        Raises:
            InputError: a tensor is not in the graph, or the graph is above protobuf's 2 GB.
        """
        unknown = next((name for name in extra_outputs if name not in self.producer), None)
        if unknown is not None:
            raise InputError(f"{self.path} has no tensor named {unknown!r}", expected="the output of one of its nodes")
        try:
            return bytes(add_outputs(self.model, extra_outputs).SerializeToString())
        except (ValueError, onnx.checker.ValidationError) as error:
            raise InputError(f"{self.path} is above 2 GB, the limit of one protobuf ({error})") from error


def read_graph(path: Path) -> GraphFile:
    """Read an ONNX file with its external data and its srdeploy metadata.

    Raises:
        InputError: not an ONNX file, external data missing, an unknown opset, other inputs and outputs than
            srdeploy's, or no srdeploy metadata.
    """
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise InputError(
            f"{path} is not an ONNX file ({error})", expected="a file written by srdeploy export"
        ) from error
    if not model.graph.node:
        raise InputError(f"{path} holds no ONNX graph", expected="a file written by srdeploy export")
    _check_names(model.graph, path)
    digest = hashlib.sha256(data)
    _load_external(model, path, digest)
    contract = ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, name=str(path))
    graph = GraphFile(model, path=path, sha256=digest.hexdigest(), contract=contract)
    if graph.opset > onnx.defs.onnx_opset_version():  # TensorRT would read it as the newest that it knows
        raise InputError(
            f"{path} is of ONNX opset {graph.opset}",
            expected=f"at most {onnx.defs.onnx_opset_version()}, the newest that onnx {onnx.__version__} knows",
        )
    return graph


def _check_names(graph: onnx.GraphProto, path: Path) -> None:
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initializers]
    outputs = [value.name for value in graph.output]
    if inputs != [INPUT] or OUTPUT not in outputs:
        raise InputError(f"{path} has inputs {inputs} and outputs {outputs}", expected=f"[{INPUT!r}] and [{OUTPUT!r}]")


def set_contract(model: onnx.ModelProto, contract: ModelContract) -> None:
    """Write a contract into a graph's metadata; entries of others stay."""
    others = {entry.key: entry.value for entry in model.metadata_props if not entry.key.startswith(PREFIX)}
    del model.metadata_props[:]
    for key, value in (others | contract.to_metadata()).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(entry.dim_value if entry.HasField("dim_value") else -1 for entry in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, shape)


def _load_external(model: onnx.ModelProto, path: Path, digest: Any) -> None:
    """Load external weights into the model and their bytes into the digest."""
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if not external:
        return
    names = sorted({entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"})
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        for name in names:
            with (path.parent / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except Exception as error:
        raise InputError(
            f"{path} refers to external weights {', '.join(names)} that cannot be read ({error})",
            next_step="copy the weights file to the ONNX file's folder",
        ) from error
