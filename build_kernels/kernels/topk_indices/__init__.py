"""The positions of the largest scores of long, ragged rows (CUDA C++)."""
