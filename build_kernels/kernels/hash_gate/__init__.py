"""Experts from a table by token id, with the gate's weights (CUDA C++)."""
