"""One tcgen05 instruction of PTX -> a call of the function of the model that stands in for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from build_kernels.emulation.statements import Statement, operand_list
from build_kernels.errors import BuildError

# Registers of the code that is made here begin with e_: none of a kernel's own does.

#: Flags of tc_mma and tc_commit (model/machine.cuh).
ACCUMULATE, LEADER, WARP, MASKED = 1, 2, 4, 16
#: The mask of what is not a multicast.
OWN_BARRIER = -1

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_WIDE = re.compile(
    r"(?P<operation>ld|st)(?P<options>[\w.:]*\.global[\w.:]*)"
    r"\.v(?P<number>\d)\.(?P<type>[bfsu])(?P<bits>\d+)"
)
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
    "16x32bx2": Form(3, 1, 1, lambda r: r * 4),
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
    """Return PTX that computes the address ``text``, such as ``[%r1+16]``, and the name of the
    register that then holds it.
    """
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
    if len(statement.operands) not in (5, 6):
        raise refused(statement, "operands other than d, a, b, instruction, (mask,) accumulate")
    d, a, b, instruction, *mask, accumulate = statement.operands
    if a.startswith("["):
        raise refused(statement, "A in tensor memory")
    code, at = address(d, statement)
    arguments = (("b32", at), ("b64", a), ("b64", b), ("b32", instruction), ("b32", "e_flags"))
    return (
        f"{{ .reg .b32 e_flags, e_more; {code} {_flags(leader)} "
        f"{_accumulates(accumulate, statement)} or.b32 e_flags, e_flags, e_more; "
        f"{_masked(mask[0], statement) if mask else ''} {call('tc_mma', *arguments)} }}"
    )


def _accumulates(operand: str, statement: Statement) -> str:
    """Return code that leaves ACCUMULATE or 0 in e_more; the operand may be a constant."""
    if operand in ("0", "1"):
        return f"mov.b32 e_more, {ACCUMULATE if operand == '1' else 0};"
    if not operand.lstrip("%").replace("$", "").isidentifier():
        raise refused(statement, f"{operand} in place of a predicate")
    return f"selp.b32 e_more, {ACCUMULATE}, 0, {operand};"


def _masked(operand: str, statement: Statement) -> str:
    """Return code that sets MASKED if a lane of the accumulator is not to be written."""
    words = operand_list(operand.strip("{} "))
    if not operand.startswith("{") or len(words) != 4:
        raise refused(statement, f"{operand} in place of a mask of 128 lanes")
    joined = " ".join(f"or.b32 e_more, e_more, {word};" for word in words)
    return (
        f"{{ .reg .pred e_some; mov.b32 e_more, 0; {joined} setp.ne.b32 e_some, e_more, 0; "
        f"selp.b32 e_more, {MASKED}, 0, e_some; or.b32 e_flags, e_flags, e_more; }}"
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


def halves(statement: Statement) -> str | None:
    """Return two accesses of 128 bits in place of one of 256 bits, which sm_90a lacks. None for any
    other instruction.
    """
    match = _WIDE.fullmatch(statement.name)
    if match is None or int(match["number"]) * int(match["bits"]) != 256:
        return None
    load = match["operation"] == "ld"
    if len(statement.operands) != 2:
        raise refused(statement, "operands other than registers and an address")
    names, place = statement.operands if load else statement.operands[::-1]
    at = _ADDRESS.fullmatch(place)
    registers = operand_list(names.strip("{} "))
    if at is None or len(registers) != int(match["number"]):
        raise refused(statement, f"the registers {names} or the address {place}")
    # A load may write the register that holds the address.
    lines = [f"{{ .reg .b64 e_place; add.s64 e_place, {at[1]}, {int(at[2] or '0', 0)};"]
    # A priority in the second-level cache is a hint, and only for accesses of 256 bits.
    options = re.sub(r"\.L2::evict_\w+", "", match["options"])
    half = len(registers) // 2
    name = f"{match['operation']}{options}.v{half}.{match['type']}{match['bits']}"
    for index in (0, 1):
        part = "{" + ", ".join(registers[index * half : (index + 1) * half]) + "}"
        address = f"[e_place+{16 * index}]"
        lines.append(f"{name} {part}, {address};" if load else f"{name} {address}, {part};")
    return " ".join((*lines, "}"))


@dataclass(frozen=True, slots=True)
class Transfer:
    """A load or a store of tensor memory.

    Attributes:
        load: Whether it is a load.
        form: How it spreads over the registers.
        repeats: How many times.
        registers: Their names.
        address: The operand.
        between: Columns from the first part of 16x32bx2 to the second.

    """

    load: bool
    form: Form
    repeats: int
    registers: tuple[str, ...]
    address: str
    between: int


def transfer(statement: Statement) -> Transfer:
    """Return what a tcgen05.ld or tcgen05.st moves."""
    match = _LOAD.fullmatch(statement.name)
    if match is None or match[2] not in FORMS:
        raise refused(statement, f"a form other than {', '.join(FORMS)}")
    load, form, repeats = match[1] == "ld", FORMS[match[2]], int(match[3])
    operands = list(statement.operands)
    between = 0
    if match[2] == "16x32bx2" and len(operands) == 3:
        between = int(operands.pop(2 if load else 1), 0)
        # It is added to an address, so that it could reach other lanes.
        if not 0 <= between < _LANE // 4:
            raise refused(statement, f"{between} between its parts")
    if len(operands) != 2:
        raise refused(statement, f"{len(operands)} operands")
    names, place = operands if load else operands[::-1]
    registers = operand_list(names.strip("{} "))
    if len(registers) != form.registers * repeats:
        raise refused(statement, f"{len(registers)} registers")
    return Transfer(load, form, repeats, registers, place, between)


def move(found: Transfer, at: str) -> str:
    """Return the code that moves the registers from or to the tensor address in a register."""
    number = found.form.number | (0 if found.load else 8) | found.between << 4
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
