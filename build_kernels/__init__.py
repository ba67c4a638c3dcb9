"""Compiles the router kernels to cubins with a pinned, hash-checked toolchain and no GPU."""
