"""The kernels inside other people's models. Each imports its package when it is used."""
