"""The kernels: one folder per kernel with its sources and launch contract, and what they share."""
