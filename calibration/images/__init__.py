"""Calibration images: sources, choice of windows within a budget of memory and time, the calibration set."""

from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.calibration.images.effort import WindowPlan, plan_windows

__all__ = ["CalibrationSet", "WindowPlan", "make_calibration_set", "plan_windows"]
