"""A model for Triton's Python backend: pictures of any size through `Upscaler`.

`srdeploy package --triton` writes it as NAME_pictures. A request has one of two inputs:

    pixels    uint8 (N, H, W, C), C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha; answered by `upscaled_pixels`
    encoded   bytes (N), files in any format that `upscale` reads; answered by `upscaled_encoded`, in the same format
              where it can be written, else PNG, with metadata kept

A request that cannot be answered gets one line as its error; others in the same batch are not affected.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import InputError, SrdeployError, UsageError
from srdeploy.core.imaging.read import opened
from srdeploy.core.sizes import parse_bytes
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.image_writer import FORMATS
from srdeploy.upscale.single_image import upscale_file
from srdeploy.upscale.upscaler import Upscaler

PIXELS, ENCODED = "pixels", "encoded"
OUTPUTS = {PIXELS: "upscaled_pixels", ENCODED: "upscaled_encoded"}
BUNDLE = "bundle"
"""The bundle's folder, next to model.py."""


class TritonPythonModel:
    """What Triton's Python backend loads: initialize, execute for lists of requests, finalize."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle next to model.py.

        The parameters `device` ("auto", "cpu", "cuda:N"), `threads` and `memory` (such as "2GiB") of the model's
        configuration are those of `srdeploy upscale`.
        """
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {name: str(entry["string_value"]) for name, entry in parameters.items()}
        memory, threads = values.get("memory"), values.get("threads")
        self._upscaler = Upscaler.open(
            Path(args["model_repository"]) / args["model_version"] / BUNDLE,
            TileSettings(memory_bytes=parse_bytes(memory, "memory") if memory else None),
            device=values.get("device", "auto"),
            threads=int(threads) if threads else None,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """Free the engine."""
        self._upscaler.close()

    def _response(self, request: Any) -> Any:
        import triton_python_backend_utils as backend

        try:
            found = {name: backend.get_input_tensor_by_name(request, name) for name in OUTPUTS}
            given = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
            if len(given) != 1:
                raise UsageError(f"inputs {', '.join(given) or 'none'}", expected=f"one of {PIXELS} and {ENCODED}")
            ((name, values),) = given.items()
            answer = upscaled_pixels(self._upscaler, values) if name == PIXELS else self._encoded(values)
        except SrdeployError as error:
            return backend.InferenceResponse(error=backend.TritonError(str(error), backend.TritonError.INVALID_ARG))
        return backend.InferenceResponse([backend.Tensor(OUTPUTS[name], answer)])

    def _encoded(self, files: NDArray[np.object_]) -> NDArray[np.object_]:
        return np.array([upscaled_file(self._upscaler, bytes(data)) for data in files], np.object_)


def upscaled_pixels(up: Upscaler, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Upscale (N, H, W, C) uint8.

    Raises:
        UsageError: another number of axes or channels, or an empty axis.
        GateError: the network's output is broken.
    """
    if pictures.ndim != 4 or 0 in pictures.shape:
        raise UsageError(f"{PIXELS} of shape {pictures.shape}", expected="(N, H, W, C), no size 0")
    return np.stack([up(picture) for picture in pictures])


def upscaled_file(up: Upscaler, data: bytes) -> bytes:
    """Upscale an encoded picture; returns its own format where it can be written, else PNG.

    Raises:
        InputError: not a picture that can be read.
        UsageError: the format cannot hold the large picture.
        GateError: the network's output is broken.
    """
    with tempfile.TemporaryDirectory(prefix="srdeploy-triton-") as folder:
        source = Path(folder) / "picture"
        source.write_bytes(data)
        try:
            with opened(source, max_pixels=None) as image:
                suffix = next((suffix for suffix, name in FORMATS.items() if name == image.format), ".png")
            output = Path(folder) / f"upscaled{suffix}"
            upscale_file(up, source, output)
        except (InputError, UsageError) as error:
            # The sender of the picture knows nothing of this folder.
            found = error.found.replace(str(source), "the picture").replace(str(folder) + "/", "")
            raise type(error)(found, expected=error.expected, next_step=error.next_step) from error
        return output.read_bytes()
