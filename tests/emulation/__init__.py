"""Runs the tcgen05 kernels in software on a Hopper GPU: ``python -m tests.emulation FOLDER``."""
