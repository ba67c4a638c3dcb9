"""Experts from a table by token id, with equal weights (CUDA C++)."""
