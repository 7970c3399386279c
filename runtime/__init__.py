"""Engines, runners, images, verification, measurement and the report."""
