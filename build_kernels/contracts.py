"""What the kernels' ``contract.py`` files say. An exception in one is an error of the build."""

from __future__ import annotations

import importlib
from typing import Any

from build_kernels.compile.job import Job
from build_kernels.errors import BuildError, JobError
from build_kernels.source_error import located
from router_runtime.errors import FormatError
from router_runtime.format.contract import Constants, Contract, validate_contract


def module(kernel: str) -> Any:
    """Return a kernel's ``contract.py`` as a module. Raises BuildError if it cannot be imported."""
    try:
        return importlib.import_module(f"build_kernels.kernels.{kernel}.contract")
    except Exception as error:
        raise BuildError(f"kernel {kernel}: {_failure(kernel, error)}") from error


def derived(kernel: str, where: str, constants: Constants) -> Constants | None:
    """Return the constants that a contract derives from those of the catalog; None if the model
    has no such variant.

    Args:
        kernel: The kernel's name.
        where: What an error begins with.
        constants: Those that are stated.

    Raises:
        BuildError: The contract refuses the constants, or fails.

    """
    contract = module(kernel)
    if not hasattr(contract, "derive"):
        return {}
    try:
        found: Constants | None = contract.derive(constants)
    except ValueError as error:
        raise BuildError(
            f"{where}: {error}; next: --kernel to build the others, or another model"
        ) from error
    except Exception as error:
        raise BuildError(f"{where}: {_failure(kernel, error)}") from error
    return found


def declared(job: Job) -> tuple[Contract, str | None]:
    """Return the contract and the numerics tag that the kernel declares for the job's constants.

    Raises JobError if the contract refuses the constants, fails, or contradicts itself.
    """
    own = module(job.kernel)
    try:
        contract = own.contract(job.constants)
        tag = own.numerics(job.constants) if hasattr(own, "numerics") else None
        if not isinstance(contract, Contract):
            raise JobError(
                job.key,
                f"expected a Contract, found {contract!r}; next: correct {_file(job.kernel)}",
            )
        validate_contract(contract, job.key)
    except JobError:
        raise
    except FormatError as error:
        text = str(error).removeprefix(f"{job.key}: ")
        raise JobError(job.key, f"{text}; next: correct {_file(job.kernel)}") from error
    except (ValueError, KeyError, ArithmeticError) as error:
        raise JobError(
            job.key,
            f"expected a contract for these constants, found {error!r}; "
            f"next: see {_file(job.kernel)} for what it serves",
        ) from error
    except Exception as error:
        raise JobError(job.key, _failure(job.kernel, error)) from error
    return contract, tag


def _failure(kernel: str, error: Exception) -> str:
    found = located(error)
    if found is None:
        return (
            f"expected {_file(kernel)} to declare the launch, found {error!r}; "
            f"next: correct {_file(kernel)}"
        )
    lines = filter(None, (found.text, found.trace))
    return "\n".join(lines) + "\nnext: correct that line and run the command again"


def _file(kernel: str) -> str:
    return f"build_kernels/kernels/{kernel}/contract.py"
