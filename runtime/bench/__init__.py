"""Measurement of latency, memory and throughput under one set of rules."""
