"""Tuning: other divisions of a model's kernels, to be timed on a GPU, and the fastest of them."""
