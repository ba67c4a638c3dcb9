"""Whether a cubin is what its kernel's contract declares."""

from __future__ import annotations

from collections.abc import Iterator

from build_kernels.compile.instructions import Census, tensor_core, waits_for_dependencies
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format.contract import Contract, validate_contract
from router_runtime.format.cubin import Cubin
from router_runtime.format.target import Target

#: Limits of a CTA on every target: shared memory in bytes (static and dynamic, with opt-in) and
#: registers, which a warp gets in units of 8 per thread.
SHARED_MEMORY_LIMIT = 227 * 1024
REGISTER_FILE = 65536


def check_contract(contract: Contract, facts: Cubin, counts: Census, where: str) -> None:
    """Raise BuildError, starting with ``where``, with every difference between cubin and contract.

    Args:
        contract: What the kernel's ``contract.py`` declares.
        facts: What the cubin says about itself.
        counts: The census of its instructions.
        where: The entry's key.

    """
    try:
        validate_contract(contract, where)
    except FormatError as error:
        raise BuildError(f"{error}; next: correct the kernel's contract.py") from error
    wrong = list(_mismatches(contract, facts, counts))
    if wrong:
        raise BuildError(
            f"{where}: the contract does not match the cubin:\n  "
            + "\n  ".join(wrong)
            + "\nnext: correct the kernel or its contract.py"
        )


def _mismatches(contract: Contract, facts: Cubin, counts: Census) -> Iterator[str]:
    layout = contract.parameter_layout(Target.parse(facts.target))
    if len(layout) != len(facts.parameters):
        names = [parameter.name for parameter in contract.parameters]
        yield f"expected {len(layout)} parameters {names}, found {len(facts.parameters)}"
    for parameter, expected, found in zip(
        contract.parameters, layout, facts.parameters, strict=False
    ):
        if expected != found:
            yield (
                f"parameter {parameter.name}: expected offset {expected[0]} and size {expected[1]} "
                f"({parameter.type}), found offset {found[0]} and size {found[1]}"
            )
    integers = {p.name for p in contract.parameters if p.type in ("i32", "i64")}
    for axis in contract.grid:
        if axis.argument is not None and axis.argument not in integers:
            yield (
                f"grid argument {axis.argument!r}: expected an integer parameter of "
                f"{sorted(integers)}"
            )
    threads = contract.block[0] * contract.block[1] * contract.block[2]
    if facts.required_block not in (None, contract.block):
        yield (
            f"block: expected {contract.block}, found that the cubin requires "
            f"{facts.required_block}"
        )
    if facts.max_threads is not None and threads > facts.max_threads:
        yield f"block: expected {threads} threads to be allowed, found at most {facts.max_threads}"
    if facts.required_cluster not in (None, contract.cluster):
        yield (
            f"cluster: expected {contract.cluster}, found that the cubin requires "
            f"{facts.required_cluster}"
        )
    registers = -(-threads // 32) * 32 * (-(-facts.registers // 8) * 8)
    if registers > REGISTER_FILE:
        yield f"registers: expected at most {REGISTER_FILE} a block, found {registers}"
    shared = facts.static_shared_memory + contract.dynamic_shared_memory
    if shared > SHARED_MEMORY_LIMIT:
        yield f"shared memory: expected at most {SHARED_MEMORY_LIMIT} bytes a block, found {shared}"
    waits = waits_for_dependencies(counts)
    if waits != contract.programmatic_dependent_launch:
        yield (
            "programmatic dependent launch: expected "
            f"{'a' if contract.programmatic_dependent_launch else 'no'} griddepcontrol.wait, "
            f"found {'one' if waits else 'none'}"
        )
    tensor = tensor_core(counts)
    if bool(tensor.allocations) != bool(tensor.releases):
        yield (
            "tensor memory: expected every allocation to be given back, found "
            f"{tensor.allocations} instructions that allocate and {tensor.releases} that release"
        )
    if tensor.multiplications and not (tensor.allocations and tensor.commits and tensor.loads):
        yield (
            "tensor memory: expected accumulators to be allocated, committed and loaded, found "
            f"{tensor}"
        )
