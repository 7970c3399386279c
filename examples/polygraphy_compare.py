"""Compare two engines of srdeploy with Polygraphy's Comparator: python polygraphy_compare.py model.onnx."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from polygraphy.comparator import Comparator, SimpleCompareFunc

from srdeploy.runtime.engines import open_engine
from srdeploy.runtime.engines.polygraphy_runner import polygraphy_runner


def main(path: Path) -> None:
    """Run ONNX Runtime and OpenVINO on one image and compare their outputs."""
    runners = [polygraphy_runner(partial(open_engine, path, engine=name), name) for name in ("onnxruntime", "openvino")]
    image = np.random.default_rng(0).random((1, 3, 48, 48), dtype=np.float32)
    results = Comparator.run(runners, data_loader=[{"input": image}])
    equal = bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-4, rtol=1e-4)))
    print(" against ".join(runner.name for runner in runners) + f": {'equal' if equal else 'different'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
