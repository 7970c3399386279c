"""Comparison of engines with the eager network: parity in decibels, quality, the first node that differs."""

from srdeploy.runtime.verify.parity import Gates, VerifyResult, verify_all

__all__ = ["Gates", "VerifyResult", "verify_all"]
