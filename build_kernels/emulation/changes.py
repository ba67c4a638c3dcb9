"""Changes of a kernel's PTX, each found by what the instructions do and not by their registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from build_kernels.emulation.roles import (
    Role,
    Roles,
    barrier_operand,
    is_arrival,
    is_commit,
    is_wait,
)
from build_kernels.emulation.statements import Statement, entry

#: How a kernel uses its accumulators (these are not the forms of the catalog). ``once``: each is
#: filled once. ``turns``: each is filled again when it has been read.
Form = Literal["once", "turns"]

Edit = tuple[int, int, str]


class Code:
    """The PTX of a kernel as defects see it."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.statements = entry(ptx).statements
        self.roles = Roles(self.statements)

    @property
    def form(self) -> Form:
        """Return the kernel's form."""
        return "turns" if self.roles.waits("sums_empty") else "once"

    def named(self, *beginnings: str) -> list[Statement]:
        """Return the instructions whose opcode begins with one of these."""
        return [s for s in self.statements if s.name.startswith(beginnings)]

    def sources(self, register: str, scope: int | None = None) -> list[Statement]:
        """Return the instructions that write a register."""
        return [
            s
            for s in self.statements
            if s.kind == "instruction"
            and s.operands[:1] == (register,)
            and (scope is None or s.scope == scope)
        ]

    def base(self, register: str) -> Statement:
        """Return the instruction that makes a descriptor, given a register that holds it or a sum
        of it and offsets.
        """
        (source,) = self.sources(register)
        return self.base(source.operands[1]) if source.name == "add.s64" else source

    def commits(self, role: Role) -> list[Statement]:
        """Return the commits to barriers of a role."""
        return [s for s in self.statements if is_commit(s) and self.roles.of(s) == role]

    def issued(self, operand: int) -> list[Statement]:
        """Return what makes the descriptors of operand 1 (A: weights) or 2 (B: hidden states)."""
        bases = {self.base(mma.operands[operand]) for mma in self.named("tcgen05.mma.")}
        return sorted(bases, key=lambda statement: statement.start)


#: What is waited for before something is filled.
_EMPTY: tuple[Role, ...] = ("hidden_empty", "weights_empty", "sums_empty")


def _operand(code: Code, statement: Statement, index: int, new: str) -> Edit:
    """Replace one operand."""
    operands = [*statement.operands[:index], new, *statement.operands[index + 1 :]]
    return _rewritten(statement, ", ".join(operands))


def _rewritten(statement: Statement, operands: str) -> Edit:
    guard = f"@{statement.guard} " if statement.guard else ""
    return statement.start, statement.end, f"{guard}{statement.name} {operands};"


def _removed(statement: Statement) -> Edit:
    return statement.start, statement.end, ""


def no_wait(code: Code, role: Role) -> list[Edit]:
    """Do not wait; the waits at the end, for all stages one after the other, stay."""
    following = dict(zip(code.roles.events, code.roles.events[1:], strict=False))
    waits = []
    for wait in (code.statements[i] for i in code.roles.waits(role)):
        after = following.get(wait)
        ends = after is not None and is_wait(after) and code.roles.of(after) in _EMPTY
        if role not in _EMPTY or not ends:
            waits.append(wait)
    return [(s.start, s.end, f"setp.eq.u32 {s.operands[0]}, 0, 0;") for s in waits]


def other_parity(code: Code, role: Role) -> list[Edit]:
    """Wait for the other phase."""
    edits = []
    for index in code.roles.waits(role):
        wait = code.statements[index]
        flipped = f"{{ .reg .b32 d_parity; xor.b32 d_parity, {wait.operands[2]}, 1; "
        operands = ", ".join((*wait.operands[:2], "d_parity"))
        edits.append((wait.start, wait.end, f"{flipped}{wait.name} {operands}; }}"))
    return edits


def arrive_early(code: Code, role: Role) -> list[Edit]:
    """Arrive where the commit is, without waiting for the MMAs."""
    edits = []
    for commit in code.commits(role):
        leader, place = commit.guard, commit.operands[0].strip("[]")
        mask = "cvt.u32.u16 d_mask, " + commit.operands[1] if len(commit.operands) > 1 else None
        own = "mov.u32 d_at, %cluster_ctarank; shl.b32 d_mask, 1, d_at"
        lines = [f"{{ .reg .b32 d_mask, d_at; .reg .pred d_to; {mask or own};"]
        for rank in range(16):
            lines.append(f"and.b32 d_at, d_mask, {1 << rank};")
            lines.append(f"setp.ne.and.b32 d_to, d_at, 0, {leader};")
            lines.append(f"@d_to mapa.shared::cluster.u32 d_at, {place}, {rank};")
            lines.append("@d_to mbarrier.arrive.release.cluster.shared::cluster.b64 _, [d_at];")
        edits.append((commit.start, commit.end, " ".join((*lines, "}"))))
    return edits


def commit_twice(code: Code, role: Role) -> list[Edit]:
    """Commit a second time."""
    return [(s.end, s.end, code.ptx[s.start : s.end]) for s in code.commits(role)]


def no_commit(code: Code, role: Role) -> list[Edit]:
    """Do not commit."""
    return [_removed(s) for s in code.commits(role)]


def other_mask(code: Code, beginning: str, new: str) -> list[Edit]:
    """Give a multicast another mask."""
    edits = []
    for statement in code.named(beginning):
        if ".multicast::cluster" in statement.name:
            for source in code.sources(statement.operands[-1], statement.scope):
                edits.append((source.start, source.end, new.format(source.operands[0])))
    return edits


OWN_MASK = (
    "{{ .reg .b32 d_own; mov.u32 d_own, %cluster_ctarank; shl.b32 d_own, 1, d_own; "
    "cvt.u16.u32 {0}, d_own; }}"
)


def other_bytes(code: Code, role: Role, change: str) -> list[Edit]:
    """Expect another number of bytes."""
    edits = []
    for statement in code.named("mbarrier.arrive.expect_tx."):
        if code.roles.of(statement) == role:
            operands = ", ".join((*statement.operands[:2], "d_bytes"))
            text = f"{{ .reg .b32 d_bytes; {change.format(statement.operands[2])} "
            edits.append((statement.start, statement.end, f"{text}{statement.name} {operands}; }}"))
    return edits


def other_start(code: Code, old: str, new: str) -> list[Edit]:
    """Let MMAs that start from zero accumulate, or the reverse."""
    edits = []
    for mma in code.named("tcgen05.mma."):
        (source,) = code.sources(mma.operands[4], mma.scope)
        if source.operands[1] == old:
            edits.append(_operand(code, source, 1, new))
    return edits


def other_descriptor(code: Code, operand: int, high: Callable[[int], int]) -> list[Edit]:
    """Change the upper 32 bits of an operand's descriptor."""
    edits = []
    for made in code.issued(operand):
        low, word = made.operands[1].strip("{} ").split(",")
        changed = f"{{{low.strip()}, {high(int(word, 0)) & 0xFFFFFFFF}}}"
        edits.append(_operand(code, made, 1, changed))
    return edits


def other_leading(code: Code) -> list[Edit]:
    """Double the leading offset of the weights."""
    edits = []
    for made in code.issued(1):
        for source in code.sources("t", made.scope):
            if source.name == "or.b32":
                edits.append(_operand(code, source, 2, str(2 * int(source.operands[2], 0))))
    return edits


def unmasked_descriptor(code: Code) -> list[Edit]:
    """Leave the CTA's rank in the address of a descriptor."""
    edits = []
    for made in (*code.issued(1), *code.issued(2)):
        edits += [_removed(s) for s in code.sources("t", made.scope) if s.name == "and.b32"]
    return edits


def other_instruction(code: Code, change: Callable[[int], int]) -> list[Edit]:
    """Change the descriptor of every MMA's instruction."""
    edits = []
    for mma in code.named("tcgen05.mma."):
        edits.append(_operand(code, mma, 3, str(change(int(mma.operands[3], 0)))))
    return edits


def other_step(code: Code) -> list[Edit]:
    """Double the offset that is added to the descriptor of the hidden states for each MMA."""
    edits: dict[int, Edit] = {}
    for mma in code.named("tcgen05.mma."):
        (source,) = code.sources(mma.operands[2])
        if source.name == "add.s64":
            twice = str(2 * int(source.operands[2], 0))
            edits[source.start] = _operand(code, source, 2, twice)
    return list(edits.values())


def other_address(code: Code, offset: int) -> list[Edit]:
    """Load tensor memory from another address."""
    edits = []
    for load in code.named("tcgen05.ld."):
        register, _, rest = load.operands[1].strip("[] ").partition("+")
        place = f"[{register.strip()}+{int(rest or '0', 0) + offset}]"
        edits.append(_operand(code, load, 1, place))
    return edits


def other_columns(code: Code, beginning: str, new: Callable[[int], int]) -> list[Edit]:
    """Allocate or give back another number of columns."""
    return [_operand(code, s, 1, str(new(int(s.operands[1], 0)))) for s in code.named(beginning)]


def without(code: Code, *beginnings: str) -> list[Edit]:
    """Leave out the instructions whose opcode begins with one of these."""
    return [_removed(s) for s in code.named(*beginnings)]


def one_warp_releases(code: Code) -> list[Edit]:
    """Let the first warp that has read an accumulator release it for all."""
    places = {
        code.roles.offset(barrier_operand(code.statements[i]))
        for i in code.roles.waits("sums_empty")
    }
    first = min(places, default=0)
    return [
        _operand(code, s, 1, "1")
        for s in code.named("mbarrier.init.")
        if places and code.roles.offset(s.operands[0]) >= first
    ]


def arrive_first(code: Code) -> list[Edit]:
    """Arrive at an accumulator's empty barrier in the first load's place, not behind the last."""
    arrivals = [s for s in code.statements if is_arrival(s) and code.roles.of(s) == "sums_empty"]
    if not arrivals:
        return []
    (wait,) = [code.statements[i] for i in code.roles.waits("sums_full")]
    barrier = wait.operands[1].strip("[]")
    (full,) = {code.roles.offset(barrier_operand(s)) for s in code.commits("sums_full")}
    empty = code.roles.offset(arrivals[0].operands[1])
    load = next(s for s in code.named("tcgen05.ld.") if s.start > wait.start)
    text = (
        "{ .reg .b32 d_lane, d_at; .reg .pred d_first; mov.u32 d_lane, %laneid; "
        f"setp.eq.u32 d_first, d_lane, 0; add.u32 d_at, {barrier}, {empty - full}; "
        "@d_first mbarrier.arrive.shared::cta.b64 _, [d_at]; }\n"
    )
    return [(load.start, load.start, text), *(_removed(s) for s in arrivals)]


def with_swizzle(value: int, bits: int) -> int:
    """Return the upper word of a descriptor with another swizzle."""
    return value & ~(7 << 29) | bits << 29
