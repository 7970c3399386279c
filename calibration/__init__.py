"""Calibration: from an FP32 ONNX file and real images to FP16, BF16, INT8 and FP8 graphs.

The stage's function is `quantize` in the module of that name. `images` makes the calibration set, `rewrites` holds
exact rewrites of graphs, `int8` builds quantized graphs, and `search` chooses among them.
"""

from typing import TYPE_CHECKING

from srdeploy.core.lazy import lazy_names

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
    from srdeploy.calibration.measurements import Measurements
    from srdeploy.calibration.options import QuantizeOptions

__all__ = ["CalibrationSet", "Measurements", "QuantizeOptions", "make_calibration_set"]

__getattr__ = lazy_names(
    __name__,
    {
        "images.dataset": ("CalibrationSet", "make_calibration_set"),
        "measurements": ("Measurements",),
        "options": ("QuantizeOptions",),
    },
)
