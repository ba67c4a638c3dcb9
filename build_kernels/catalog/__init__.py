"""Kernels, models, targets and measured latencies, as data."""
