"""``python -m build_kernels`` is ``build-kernels``.

The catalog is imported with the commands. An exception in it is reported as the line that is wrong.
"""

from build_kernels.source_error import located

try:
    from build_kernels import cli
except Exception as error:
    found = located(error)
    if found is None:
        raise
    raise SystemExit(
        "\n".join(filter(None, (f"Error: {found.text}", found.trace)))
        + "\nnext: correct that line and run the command again"
    ) from None


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="build-kernels")


if __name__ == "__main__":
    main()
