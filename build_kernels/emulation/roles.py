"""What the mbarriers of a kernel are for, found from the structure of its PTX.

An address is followed back through moves and additions to an offset in dynamic shared memory; what
varies (the stage of a ring) drops out. A barrier's role follows from who completes its phases and
who waits for them, so it is found whatever the compiler calls its registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from build_kernels.emulation.statements import Statement

#: - ``weights_full``, ``hidden_full``: completed by the bytes of contiguous copies from global
#:   memory, or of boxes of a tensor map; ``stages_full``: by both.
#: - ``weights_empty``, ``hidden_empty``: what the issuer of such a copy waits for before it.
#: - ``sums_full``: what is waited for before loads of tensor memory.
#: - ``sums_empty``: where threads arrive after such loads.
#: - ``peers_full``: completed by bytes from other CTAs.
Role = Literal[
    "weights_full",
    "hidden_full",
    "stages_full",
    "weights_empty",
    "hidden_empty",
    "sums_full",
    "sums_empty",
    "peers_full",
]

_COPY = "cp.async.bulk.shared::cluster.global."
_TILE = "cp.async.bulk.tensor."
_EXPECT = "mbarrier.arrive.expect_tx."
_LOAD = "tcgen05.ld."


class Roles:
    """The barriers of one entry function.

    Args:
        statements: Of its body.

    """

    def __init__(self, statements: Sequence[Statement]) -> None:
        self.statements = statements
        self._sources: dict[str, list[Statement]] = {}
        for statement in statements:
            if statement.kind == "instruction" and statement.operands:
                self._sources.setdefault(statement.operands[0], []).append(statement)
        #: The instructions that show what a barrier is for.
        self.events = [s for s in statements if _is_event(s)]
        self._rings = self._found_rings()

    def of(self, statement: Statement) -> Role | None:
        """Return the role of the barrier that an mbarrier instruction or a commit names."""
        offset = self.offset(barrier_operand(statement))
        starts = [start for start in self._rings if start <= offset]
        return self._rings[max(starts)] if starts else None

    def waits(self, role: Role) -> list[int]:
        """Return the indices of the waits for barriers of a role."""
        return [i for i, s in enumerate(self.statements) if is_wait(s) and self.of(s) == role]

    def offset(self, operand: str) -> int:
        """Return the constant part of an address, in bytes of dynamic shared memory."""
        register, _, rest = operand.strip("[] ").partition("+")
        return self._constant(register.strip(), frozenset()) + int(rest or "0", 0)

    def _constant(self, name: str, seen: frozenset[str]) -> int:
        try:
            return int(name, 0)
        except ValueError:
            pass
        sources = self._sources.get(name, [])
        if len(sources) != 1 or name in seen:
            return 0
        operation, operands = sources[0].name, sources[0].operands
        seen |= {name}
        if operation in ("mov.b32", "mov.u32"):
            # A constant that is moved may be an index: only what is added to an address counts.
            return self._constant(operands[1], seen)
        if operation in ("add.s32", "add.u32"):
            return sum(self._constant(operand, seen) for operand in operands[1:])
        if operation == "mad.lo.s32":
            return self._constant(operands[3], seen)
        return 0

    def _found_rings(self) -> dict[int, Role]:
        """Return the offset of each barrier whose role shows directly: the first one of a ring, or
        every one where the ring's loop is unrolled.
        """
        found: dict[int, Role] = {}
        following = [*self.events[1:], None]
        for event, after in zip(self.events, following, strict=True):
            if is_copy(event):
                offset = self.offset(barrier_operand(event))
                role = _filled(event, "hidden_full", "weights_full")
                found[offset] = role if found.get(offset, role) == role else "stages_full"
            elif is_wait(event) and after is not None and is_copy(after):
                empty = _filled(after, "hidden_empty", "weights_empty")
                found.setdefault(self.offset(barrier_operand(event)), empty)
        for before, event, after in zip([None, *self.events], self.events, following, strict=False):
            offset = self.offset(barrier_operand(event))
            shown = self._shown(before, event, after)
            starts = [start for start in found if start <= offset]
            # Stages that other CTAs fill, too, are expected apart from their copies.
            if shown == "peers_full" and starts and found[max(starts)] == "stages_full":
                continue
            if shown is not None:
                found.setdefault(offset, shown)
        return found

    def _shown(
        self, before: Statement | None, event: Statement, after: Statement | None
    ) -> Role | None:
        """Return the role of the barrier of an instruction that is no copy, if those before and
        behind it show it."""
        next_name = after.name if after is not None else ""
        if is_wait(event) and after is not None and next_name.startswith(_EXPECT):
            if self._same(event, after):
                return None
            copies = (s for s in self.events[self.events.index(event) :] if is_copy(s))
            return _filled(next(copies), "hidden_empty", "weights_empty")
        if is_wait(event) and next_name.startswith(_LOAD):
            return "sums_full"
        if is_arrival(event) and before is not None and before.name.startswith(_LOAD):
            return "sums_empty"
        if event.name.startswith(_EXPECT) and not (after is not None and is_copy(after)):
            return "peers_full"
        return None

    def _same(self, one: Statement, other: Statement) -> bool:
        """Whether two instructions name the same barrier, or two of one ring."""
        return self.offset(barrier_operand(one)) == self.offset(barrier_operand(other))


def _filled(copy: Statement, by_boxes: Role, by_bytes: Role) -> Role:
    """Return one of two roles, by the kind of a copy."""
    return by_boxes if copy.name.startswith(_TILE) else by_bytes


def _is_event(statement: Statement) -> bool:
    """Whether it shows what a barrier is for."""
    of_memory = statement.name.startswith((_LOAD, "tcgen05.mma."))
    return of_memory or any(test(statement) for test in (is_wait, is_arrival, is_commit, is_copy))


def is_copy(statement: Statement) -> bool:
    """Whether it copies from global memory to shared memory."""
    return statement.name.startswith((_COPY, _TILE))


def is_wait(statement: Statement) -> bool:
    """Whether it waits for an mbarrier."""
    return statement.name.startswith("mbarrier.try_wait.")


def is_arrival(statement: Statement) -> bool:
    """Whether it arrives at an mbarrier, with or without bytes to expect."""
    return statement.name.startswith("mbarrier.arrive.")


def is_commit(statement: Statement) -> bool:
    """Whether it commits MMAs to an mbarrier."""
    return statement.name.startswith("tcgen05.commit.")


def barrier_operand(statement: Statement) -> str:
    """Return the operand that names the barrier of a wait, an arrival, a commit or a copy."""
    if is_commit(statement) or statement.name.startswith("mbarrier.init."):
        return statement.operands[0]
    if statement.name.startswith((_COPY, _TILE)):
        return statement.operands[2 if statement.name.startswith(_TILE) else 3]
    return statement.operands[1]
