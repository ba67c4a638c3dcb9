"""``python -m build_kernels`` is ``build-kernels``."""

from build_kernels.cli import main

if __name__ == "__main__":
    main(prog_name="build-kernels")
