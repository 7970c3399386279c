"""Exact graph rewrites that make quantization more accurate or faster."""

from srdeploy.calibration.rewrites.deconvolution import rewrite_deconvolutions
from srdeploy.calibration.rewrites.equalize import equalize_channels
from srdeploy.calibration.rewrites.streams import add_reader_scales, fold_reader_scales

__all__ = ["add_reader_scales", "equalize_channels", "fold_reader_scales", "rewrite_deconvolutions"]
