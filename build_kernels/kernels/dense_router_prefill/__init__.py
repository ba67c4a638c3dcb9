"""The dense router for many tokens: entries of the dense forms (kernels/dense)."""
