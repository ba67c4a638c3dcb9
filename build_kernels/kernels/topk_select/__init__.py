"""The largest scores of every row and their columns (CUDA C++)."""
