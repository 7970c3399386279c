"""Exact graph rewrites that make quantization better or faster."""
