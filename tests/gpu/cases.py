"""What the tests of this folder share: machines, engine families, shapes, images."""

import os

import numpy as np
import pytest
from gpu_simulator.install import Setting

from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.gpu import why_no_gpu
from srdeploy.runtime.engines.registry import availability

REAL_ONLY = os.environ.get("SRDEPLOY_TEST_GPU") == "real"
REAL = REAL_ONLY or why_no_gpu() is None
MACHINES = {
    "simulated-10.16-late": Setting("10.16.1.11", schedule="late"),
    "simulated-11.4-at-once": Setting("11.4.0.106", schedule="at-once"),
    "simulated-11.4-random": Setting("11.4.0.106", schedule="random", seed=1),
}
FIRST = next(iter(MACHINES))
BUILT = ("tensorrt", "tensorrt-rtx")
OPENED = ("onnxruntime-cuda", "onnxruntime-tensorrt")
ELSEWHERE = {"tensorrt-rtx": FIRST, "onnxruntime-tensorrt": FIRST}
"""The one simulated machine that is enough for a family. ONNX Runtime's TensorRT provider needs TensorRT 10."""
PROFILE = ShapeProfile((1, 3, 8, 8), (1, 3, 48, 64), (4, 3, 96, 128))


def needs(engine: str) -> None:
    """Skip a test whose engine family is missing; on simulated GPUs none is, and `make test-gpu` wants them all."""
    status = next(status for status in availability() if status.name == engine)
    reason = status.why_not_run or (status.why_not_build if engine in BUILT else None)
    if reason and (REAL_ONLY or not REAL):
        pytest.fail(f"{engine} is missing: {reason}")
    if reason:
        pytest.skip(f"{engine}: {reason}")


def image(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random values in 0..1, (N, C, H, W) float32."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR of two images on 0..1."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * np.log10(error)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Compare results of FP16 kernels: another kernel may round another way."""
    np.testing.assert_allclose(found, wanted, atol=2e-3)
