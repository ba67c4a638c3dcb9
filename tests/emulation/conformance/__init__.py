"""Kernels of other projects, which validate the emulation's model: they are known to be right."""
