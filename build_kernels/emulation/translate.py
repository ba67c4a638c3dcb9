"""PTX for a target of the family 10.x -> PTX for sm_90a with every tcgen05 instruction in software.

Each tcgen05 instruction becomes a call of a function of the model. Beside that:

- The entry begins with a call that poisons shared memory.
- A loop that waits for an mbarrier becomes a call that waits, so that work which has been put off
  is done there, and a wait that does not end is an error.
- A copy from global memory becomes a call that begins it, now or later.
- Before a barrier of the CTA or the cluster, and before the end, what a warp has put off is done.
- A load of tensor memory happens as late as the PTX ISA allows: at ``tcgen05.wait::ld``, or before
  the first instruction that uses one of its registers. Until then they hold NaN.
- ``setmaxnreg`` is left out: the functions have registers of their own.
- An access of 256 bits becomes two of 128 bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from build_kernels.catalog.targets import BLACKWELL
from build_kernels.emulation import instructions
from build_kernels.emulation.instructions import OWN_BARRIER, address, call, guarded, refused
from build_kernels.emulation.statements import Statement, edited, entry, operand_list
from build_kernels.errors import BuildError

TARGET = "sm_90a"

#: tcgen05 instructions that do nothing here: nothing of the model runs in the background.
_ORDER = frozenset(
    {
        "tcgen05.fence::before_thread_sync",
        "tcgen05.fence::after_thread_sync",
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned",
        "tcgen05.wait::st.sync.aligned",
    }
)
_ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned"
_WAIT_LOAD = "tcgen05.wait::ld.sync.aligned"
_COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster"
_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
_TILE = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
_MULTICAST = ".multicast::cluster"

_BLOCKING = re.compile(r"(bar\.sync|barrier\.sync|barrier\.cluster\.(arrive|wait)|exit|ret)\b.*")
_TEST = re.compile(r"mbarrier\.(try|test)_wait\b.*")
_TRY_WAIT = re.compile(r"mbarrier\.try_wait\.parity\.shared(::cta)?\.b64")
_HEADER = re.compile(r"^\.version (\d+\.\d+)$", re.M)
_TARGET = re.compile(r"^\.target (\w+).*$", re.M)
_ADDRESS_SIZE = ".address_size 64"
_NAN = "0x7fc0dead"


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated module.

    Attributes:
        ptx: Its text, the model included.
        replaced: Each tcgen05 instruction that was replaced -> how often.
        unwaited: Lines of loads of tensor memory that no ``wait::ld`` follows in the same
            straight-line code: they may read what a later MMA writes.

    """

    ptx: str
    replaced: dict[str, int]
    unwaited: tuple[int, ...]


def translate(ptx: str, model: str) -> Translation:
    """Return a kernel's module for sm_90a.

    Args:
        ptx: The kernel's own, for a target with tcgen05: one entry function.
        model: The model's PTX, for sm_90a.

    Raises:
        BuildError: With the line, for a tcgen05 instruction or a form of one that the model does
            not have.

    """
    work = _Work(entry(ptx).statements)
    work.run()
    versions = [_HEADER.search(text) for text in (ptx, model)]
    target = _TARGET.search(ptx)
    if None in versions or target is None or target[1] not in BLACKWELL:
        raise BuildError(
            f"expected PTX with a version and a target of {', '.join(BLACKWELL)}, found "
            f"{target[1] if target else 'neither'}"
        )
    newest = max((match[1] for match in versions if match), key=_version)
    body = edited(ptx, work.edits)
    head, _, rest = body.partition(_ADDRESS_SIZE)
    head = _HEADER.sub(f".version {newest}", head)
    head = _TARGET.sub(f".target {TARGET}", head)
    functions = model.partition(_ADDRESS_SIZE)[2]
    text = f"{head}{_ADDRESS_SIZE}\n{functions}\n{rest}"
    return Translation(text, dict(sorted(work.replaced.items())), tuple(work.unwaited))


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@dataclass(slots=True)
class _Load:
    """A load of tensor memory that has not been made yet."""

    statement: Statement
    transfer: instructions.Transfer
    register: str


class _Work:
    """The edits of one entry function."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        self.statements = statements
        self.edits: list[tuple[int, int, str]] = []
        self.replaced: dict[str, int] = {}
        self.unwaited: list[int] = []
        self._pending: list[_Load] = []
        self._declared: list[str] = []
        self._labels = 0

    def run(self) -> None:
        """Make the edits."""
        for index, statement in enumerate(self.statements):
            self._before(statement)
            if statement.kind == "instruction":
                self._instruction(index, statement)
        first = next(s for s in self.statements if s.kind != "directive")
        declared = "".join(f".reg .b32 {name};\n" for name in self._declared)
        self.edits.insert(0, (first.start, first.start, f"{declared}{call('tc_enter')}\n"))

    # --- loads that are made late ---

    def _before(self, statement: Statement) -> None:
        """Make the pending loads that may not be put off beyond this statement."""
        straight = statement.kind in ("instruction", "directive") and not _leaves(statement)
        if not straight:
            self.unwaited += [load.statement.line for load in self._pending]
            self._make(self._pending, statement.start)
            return
        used = statement.registers() if statement.kind == "instruction" else frozenset[str]()
        touched = [load for load in self._pending if used.intersection(load.transfer.registers)]
        self.unwaited += [load.statement.line for load in touched]
        self._make(touched, statement.start)

    def _make(self, loads: Sequence[_Load], place: int) -> None:
        for load in loads:
            code = instructions.move(load.transfer, load.register)
            self.edits.append((place, place, f"{code}\n"))
        self._pending = [load for load in self._pending if load not in loads]

    def _load(self, statement: Statement) -> str:
        found = instructions.transfer(statement)
        if found.load and statement.guard is not None:
            raise refused(statement, "a guard")
        code, at = address(found.address, statement)
        if not found.load:
            return f"{{ {code} {instructions.move(found, at)} }}"
        register = f"e_load{len(self._declared)}"
        self._declared.append(register)
        self._pending.append(_Load(statement, found, register))
        poison = " ".join(f"mov.b32 {name}, {_NAN};" for name in found.registers)
        return f"{{ {code} mov.b32 {register}, {at}; }} {poison}"

    # --- instructions ---

    def _instruction(self, index: int, statement: Statement) -> None:
        name = statement.name
        if name.startswith("tcgen05."):
            self.replaced[name] = self.replaced.get(name, 0) + 1
            self._exchange(statement, *self._tensor_core(index, statement))
        elif name.startswith("setmaxnreg."):
            self._exchange(statement, "")
        elif name.startswith("cp.async.bulk.") and name.partition(_MULTICAST)[0] in (_COPY, _TILE):
            self._exchange(statement, _copy(statement), statement.guard)
        elif name.startswith("cp.async.bulk.") and "mbarrier" in name:
            self._insert(statement, call("tc_delay"))
        elif _TEST.fullmatch(name):
            self._wait(index, statement)
        elif (split := instructions.halves(statement)) is not None:
            self._exchange(statement, split, statement.guard)
        elif _BLOCKING.fullmatch(name):
            self._insert(statement, call("tc_settle"))

    def _exchange(self, statement: Statement, code: str, guard: str | None = None) -> None:
        code = guarded(guard, code, self._label()) if code else ""
        self.edits.append((statement.start, statement.end, code))

    def _insert(self, statement: Statement, code: str) -> None:
        code = guarded(statement.guard, code, self._label())
        self.edits.append((statement.start, statement.start, f"{code}\n"))

    def _label(self) -> str:
        self._labels += 1
        return f"$L__emulation_{self._labels}"

    def _tensor_core(self, index: int, statement: Statement) -> tuple[str, str | None]:
        """Return the code for a tcgen05 instruction, and the guard that it needs."""
        name, guard = statement.name, statement.guard
        if name in _ORDER:
            return "", None
        if name == _WAIT_LOAD:
            self._make(self._pending, statement.start)
            return "", None
        if name in (f"{_ALLOCATE}.shared::cta.b32", f"{_ALLOCATE}.b32"):
            return instructions.allocate(statement), guard
        if name == "tcgen05.dealloc.cta_group::1.sync.aligned.b32":
            return instructions.deallocate(statement), guard
        leader = guard if self._elected(index, statement) else None
        if name == "tcgen05.mma.cta_group::1.kind::f16":
            return instructions.multiply(statement, leader), None if leader else guard
        if name in (f"{_COMMIT}.b64", f"{_COMMIT}{_MULTICAST}.b64"):
            return instructions.commit(statement, leader), None if leader else guard
        if name.startswith(("tcgen05.ld.", "tcgen05.st.")):
            return self._load(statement), guard
        raise refused(statement, "an instruction that has no function")

    def _elected(self, index: int, statement: Statement) -> bool:
        """Whether the guard is the predicate of an elect.sync of the whole warp in the same scope:
        the warp is together there.
        """
        if statement.guard is None or statement.guard.startswith("!"):
            return False
        for before in reversed(self.statements[:index]):
            if before.scope != statement.scope or before.kind == "label":
                return False
            if before.name == "elect.sync":
                chosen, members = before.operands
                whole = members in ("0xffffffff", "-1")
                return whole and chosen.partition("|")[2] == statement.guard
        return False

    def _wait(self, index: int, statement: Statement) -> None:
        """``L: try_wait p; @!p bra L;`` becomes a call that waits; any other test stays."""
        before, after = self.statements[index - 1], self.statements[index + 1]
        done, barrier, *rest = statement.operands
        loops = (
            _TRY_WAIT.fullmatch(statement.name) is not None
            and statement.guard is None
            and before.kind == "label"
            and after.name in ("bra", "bra.uni")
            and after.guard == f"!{done}"
            and after.operands == (before.name,)
        )
        code, at = address(barrier, statement)
        if loops:
            waits = call("tc_wait", ("b32", at), ("b32", rest[0]))
            self._exchange(statement, f"{{ {code} {waits} }} setp.eq.u32 {done}, 0, 0;")
        else:
            self._insert(statement, f"{{ {code} {call('tc_poll', ('b32', at))} }}")


def _leaves(statement: Statement) -> bool:
    return statement.name.partition(".")[0] in ("bra", "brx", "call", "exit", "ret")


def _copy(statement: Statement) -> str:
    """Return the call for a copy from global memory, contiguous or of a box of a tensor map."""
    multicast = statement.name.endswith(_MULTICAST)
    operands = list(statement.operands)
    mask = f"mov.b32 e_mask, {OWN_BARRIER};"
    if multicast:
        mask = f"cvt.u32.u16 e_mask, {operands.pop()};"
    tile = statement.name.startswith(_TILE)
    if len(operands) != (3 if tile else 4):
        raise refused(statement, "other operands than target, source, size and barrier")
    target, source, barrier = operands[0], operands[1], operands[-1]
    registers = ".reg .b32 e_mask, e_target, e_barrier; .reg .b64 e_source;"
    lines = [f"{{ {registers} {mask}"]
    for text, name in ((target, "e_target"), (barrier, "e_barrier")):
        code, at = address(text, statement)
        lines.append(f"{{ {code} mov.b32 {name}, {at}; }}")
    if tile:
        tensor_map, place = operand_list(source.strip("[] "))
        x, y = operand_list(place.strip("{} "))
        lines.append(f"mov.b64 e_source, {tensor_map};")
        between = [("b32", x), ("b32", y)]
        function = "tc_copy_tile"
    else:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*\]", source)
        if match is None:
            raise refused(statement, f"the source {source}")
        lines.append(f"mov.b64 e_source, {match[1]};")
        between = [("b32", operands[2])]
        function = "tc_copy_bulk"
    arguments = (("b32", "e_target"), ("b64", "e_source"), *between)
    lines.append(call(function, *arguments, ("b32", "e_barrier"), ("b32", "e_mask")))
    return " ".join((*lines, "}"))
