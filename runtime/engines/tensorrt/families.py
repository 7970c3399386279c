"""TensorRT and TensorRT-RTX as engine families: what the registry asks of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.core.progress import Progress
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.gpu import Gpu, find_gpu, why_no_gpu
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.build import build_plan
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.products import Product
from srdeploy.runtime.engines.tensorrt.rtx import RTX


@dataclass(frozen=True)
class TensorRtFamily:
    """One TensorRT product with the functions that every engine family has."""

    product: Product

    @property
    def REFUSED_OPTIONS(self) -> Mapping[str, str]:  # noqa: N802  # a constant in the other families
        """Build options that the product does not have, each with the reason."""
        return self.product.refused_options

    def build(self, graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
        """Build an engine; see `build_plan`."""
        return build_plan(self.product, graph, options, progress)

    def open_built(
        self, engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None, device: str
    ) -> Runner:
        """Open an engine on a GPU; see `open_plan`. Threads and parity mode do not apply."""
        from srdeploy.runtime.engines.tensorrt.open import open_plan

        return open_plan(self.product, engine, device, outputs)

    def key_parts(self, options: BuildOptions) -> dict[str, Any]:
        """Return what decides the engine's bytes besides graph and options."""
        trt = self.product.load()
        return {"versions": {self.product.name: trt.__version__}, "target": self.product.target(options)}

    def versions(self) -> dict[str, str]:
        """Return the versions of the installed packages."""
        return self.product.versions()

    def why_not_build(self) -> str | None:
        """Return why no engine can be built here; None if one can. TensorRT-RTX needs no GPU."""
        self.product.load()
        return None if self.product is RTX else why_no_gpu() or self.product.why_not_driver()

    def why_not_run(self, device: str = "auto") -> str | None:
        """Return why no engine can run on a GPU of this machine; None if one can."""
        trt = self.product.load()
        found = find_gpu(device)
        if found is None:
            return why_no_gpu()
        return self.product.why_not_driver() or self.product.why_not_run(trt, found)

    def precisions(self, found: Gpu | None) -> tuple[Precision, ...]:
        """Return the precisions that are worth building for a GPU."""
        return self.product.precisions(found)


FULL_FAMILY = TensorRtFamily(FULL)
RTX_FAMILY = TensorRtFamily(RTX)
