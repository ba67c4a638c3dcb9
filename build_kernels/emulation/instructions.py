"""One tcgen05 instruction of PTX -> a call of the function of the model that stands in for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from build_kernels.emulation.statements import Statement, operand_list
from build_kernels.errors import BuildError

# Registers of the code that is made here begin with e_: none of a kernel's own does.

#: Flags of tc_mma and tc_commit (model/machine.cuh).
ACCUMULATE, LEADER, WARP = 1, 2, 4
#: The mask of what is not a multicast.
OWN_BARRIER = -1

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_LOAD = re.compile(r"tcgen05\.(ld|st)\.sync\.aligned\.(\w+)\.x(\d+)\.b32")


@dataclass(frozen=True, slots=True)
class Form:
    """How a load or a store of tensor memory spreads over a warp's registers.

    Attributes:
        number: Of the form, for tc_row.
        registers: Per repetition.
        columns: Per repetition.
        place: Bytes from the thread's first register to register r in the model's memory.

    """

    number: int
    registers: int
    columns: int
    place: Callable[[int], int]


#: Bytes of a lane of tensor memory.
_LANE = 512 * 4
FORMS = {
    "16x256b": Form(0, 4, 8, lambda r: (r >> 1 & 1) * 8 * _LANE + (r >> 2) * 32 + (r & 1) * 4),
    "32x32b": Form(1, 1, 1, lambda r: r * 4),
    "16x128b": Form(2, 2, 4, lambda r: (r & 1) * 8 * _LANE + (r >> 1) * 16),
}


def refused(statement: Statement, why: str) -> BuildError:
    """Return the error for an instruction that the model does not have."""
    operands = ", ".join(statement.operands)
    return BuildError(
        f"line {statement.line}: expected an instruction that the emulation has, found "
        f"{statement.name} {operands}: {why}; next: add it to build_kernels/emulation, or do not "
        "use it"
    )


def call(function: str, *arguments: tuple[str, str | int], result: str | None = None) -> str:
    """Return PTX that calls a function with (type, operand) arguments and keeps its result."""
    lines = ["{"]
    for index, (kind, operand) in enumerate(arguments):
        lines.append(f".param .{kind} e_in{index}; st.param.{kind} [e_in{index}], {operand};")
    inputs = ", ".join(f"e_in{index}" for index in range(len(arguments)))
    if result is None:
        lines.append(f"call {function}, ({inputs});" if inputs else f"call {function};")
    else:
        lines.append(
            f".param .b64 e_out; call (e_out), {function}, ({inputs}); "
            f"ld.param.b64 {result}, [e_out];"
        )
    return " ".join((*lines, "}"))


def guarded(guard: str | None, code: str, label: str) -> str:
    """Return code that runs only where an instruction with this guard would."""
    if guard is None:
        return code
    negated = guard.removeprefix("!") if guard.startswith("!") else f"!{guard}"
    return f"@{negated} bra {label};\n{code}\n{label}:"


def address(text: str, statement: Statement) -> tuple[str, str]:
    """Return (code, register): code that leaves the address ``[register + offset]`` there."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise refused(statement, f"the address {text}")
    return f".reg .b32 e_at; add.u32 e_at, {match[1]}, {int(match[2] or '0', 0)};", "e_at"


def allocate(statement: Statement) -> str:
    """Return the call for tcgen05.alloc."""
    code, at = address(statement.operands[0], statement)
    return f"{{ {code} {call('tc_alloc', ('b32', at), ('b32', statement.operands[1]))} }}"


def deallocate(statement: Statement) -> str:
    """Return the call for tcgen05.dealloc."""
    base, columns = statement.operands
    return call("tc_dealloc", ("b32", base), ("b32", columns))


def multiply(statement: Statement, leader: str | None) -> str:
    """Return the call for tcgen05.mma; ``leader``: the predicate of the elected thread, where the
    whole warp calls.
    """
    if len(statement.operands) != 5:
        raise refused(statement, "operands other than d, a, b, instruction, accumulate")
    d, a, b, instruction, accumulate = statement.operands
    if not accumulate.lstrip("%").replace("$", "").isidentifier():
        raise refused(statement, f"{accumulate} in place of a predicate")
    if a.startswith("["):
        raise refused(statement, "A in tensor memory")
    code, at = address(d, statement)
    arguments = (("b32", at), ("b64", a), ("b64", b), ("b32", instruction), ("b32", "e_flags"))
    return (
        f"{{ .reg .b32 e_flags, e_more; {code} {_flags(leader)} "
        f"selp.b32 e_more, {ACCUMULATE}, 0, {accumulate}; or.b32 e_flags, e_flags, e_more; "
        f"{call('tc_mma', *arguments)} }}"
    )


def commit(statement: Statement, leader: str | None) -> str:
    """Return the call for tcgen05.commit, to one barrier or to those of several CTAs."""
    multicast = "multicast::cluster" in statement.name
    if len(statement.operands) != 1 + multicast:
        raise refused(statement, "other operands than a barrier and a mask")
    code, at = address(statement.operands[0], statement)
    mask = f"mov.b32 e_mask, {OWN_BARRIER};"
    if multicast:
        mask = f"cvt.u32.u16 e_mask, {statement.operands[1]};"
    arguments = (("b32", at), ("b32", "e_mask"), ("b32", "e_flags"))
    return (
        f"{{ .reg .b32 e_flags, e_mask; {code} {mask} {_flags(leader)} "
        f"{call('tc_commit', *arguments)} }}"
    )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A load or a store of tensor memory.

    Attributes:
        load: Whether it is a load.
        form: How it spreads over the registers.
        repeats: How many times.
        registers: Their names.
        address: The operand.

    """

    load: bool
    form: Form
    repeats: int
    registers: tuple[str, ...]
    address: str


def transfer(statement: Statement) -> Transfer:
    """Return what a tcgen05.ld or tcgen05.st moves."""
    match = _LOAD.fullmatch(statement.name)
    if match is None or match[2] not in FORMS or len(statement.operands) != 2:
        raise refused(statement, f"a form other than {', '.join(FORMS)}")
    load, form, repeats = match[1] == "ld", FORMS[match[2]], int(match[3])
    names, place = statement.operands if load else statement.operands[::-1]
    registers = operand_list(names.strip("{} "))
    if len(registers) != form.registers * repeats:
        raise refused(statement, f"{len(registers)} registers")
    return Transfer(load, form, repeats, registers, place)


def move(found: Transfer, at: str) -> str:
    """Return the code that moves the registers from or to the tensor address in a register."""
    number = found.form.number | (0 if found.load else 8)
    columns = found.form.columns * found.repeats
    arguments = (("b32", at), ("b32", number), ("b32", columns))
    lines = ["{ .reg .b64 e_row;", call("tc_row", *arguments, result="e_row")]
    for index, name in enumerate(found.registers):
        place = f"[e_row+{found.form.place(index)}]"
        if found.load:
            lines.append(f"ld.volatile.global.b32 {name}, {place};")
        else:
            lines.append(f"st.volatile.global.b32 {place}, {name};")
    return "\n".join((*lines, "}"))


def _flags(leader: str | None) -> str:
    if leader is None:
        return "mov.b32 e_flags, 0;"
    return f"selp.b32 e_flags, {LEADER | WARP}, {WARP}, {leader};"
