"""PTX instructions as Python functions for CuTe DSL sources."""
