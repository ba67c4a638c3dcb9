"""One GPU: driver, artifacts, the choice of kernels, loading and launching."""
