"""The dense router for few tokens: entries of the dense forms (kernels/dense)."""
