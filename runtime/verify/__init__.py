"""Comparison of engines with the eager network: parity, quality, the first differing node."""
