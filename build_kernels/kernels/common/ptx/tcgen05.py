"""The tensor core of sm_100a and sm_103a: tensor memory, MMA, and the order between them.

The accumulator of an MMA lies in tensor memory: 128 lanes (its rows) by 512 columns of 32 bits, of
which a CTA allocates a power of two. The operands are read from shared memory by 64-bit
descriptors (tcgen05_layout.py). An MMA runs on its own, in order with the thread's other MMAs,
and a commit arrives at an mbarrier when it and all before it have completed.

A whole warp calls ``mma`` and ``commit``; one lane, always the same, executes them. So the
addresses stay in uniform registers, where the instruction needs them. Addresses of shared memory
are 32-bit integers, as in memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.ptx.inline import asm, pure, struct, unpack
from build_kernels.kernels.common.ptx.tcgen05_layout import ADDRESS_MASK, repeats

# --- tensor memory --------------------------------------------------------------------------------


def allocate(shared: Int32, columns: int) -> None:
    """Allocate tensor memory; its address goes to shared memory. A whole warp calls this and waits
    until enough columns are free."""
    asm(
        None,
        [shared],
        f"tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [$0], {columns};",
        "r,~{memory}",
    )


def relinquish() -> None:
    """Let other CTAs of the multiprocessor allocate. The allocating warp calls this."""
    asm(None, [], "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;", "~{memory}")


def deallocate(address: Int32, columns: int) -> None:
    """Free what was allocated. A whole warp calls this after the CTA's last access to it."""
    asm(
        None,
        [address],
        f"tcgen05.dealloc.cta_group::1.sync.aligned.b32 $0, {columns};",
        "r,~{memory}",
    )


def load(address: Int32, columns: int) -> list[Float32]:
    """Load ``columns`` columns of 16 lanes, as tcgen05_layout.fragment says, and wait for them.

    ``address`` has the first lane in its upper half: warp w of a warpgroup reads lanes 32 w to
    32 w + 31 only, so 32 w or 32 w + 16. Loads and wait are one piece of assembly: otherwise the
    compiler could read a register before the wait.
    """
    registers = columns // 2
    names = [f"${i}" for i in range(registers)]
    text = _loads(f"${registers}", columns, names)
    constraints = ",".join(["=f"] * registers) + ",r,~{memory}"
    result = asm(struct(T.f32(), registers), [address], text, constraints)
    return unpack(result, Float32, T.f32(), registers)


def add(address: Int32, columns: int, sums: Sequence[Float32]) -> list[Float32]:
    """Return ``sums`` plus what ``load`` would load, each rounded once.

    One piece of assembly: the compiler would else begin every load of a row before the first
    addition, and run out of registers.
    """
    registers = columns // 2
    names = [f"t{i}" for i in range(registers)]
    lines = [f"{{ .reg .f32 t<{registers}>;", _loads(f"${registers}", columns, names)]
    lines += [f"add.rn.f32 ${i}, ${i}, t{i};" for i in range(registers)]
    ties = [str(i) for i in range(registers)]
    result = asm(
        struct(T.f32(), registers),
        [address, *sums],
        "\n".join(lines) + " }",
        ",".join([*["=f"] * registers, "r", *ties, "~{memory}"]),
    )
    return unpack(result, Float32, T.f32(), registers)


def _loads(address: str, columns: int, registers: Sequence[str]) -> str:
    lines, first = [], 0
    for repeat in repeats(columns):
        names = ",".join(registers[first : first + 4 * repeat])
        place = f"[{address} + {first * 2}]"
        lines.append(f"tcgen05.ld.sync.aligned.16x256b.x{repeat}.b32 {{{names}}}, {place};")
        first += 4 * repeat
    return "\n".join([*lines, "tcgen05.wait::ld.sync.aligned;"])


# --- multiply -------------------------------------------------------------------------------------


def operand(base: int, address: Int32) -> Int64:
    """Return the descriptor ``base`` of an operand, moved to a shared address."""
    return Int64(pure(T.i64(), [address], operand_assembly(base), "=l,r"))


def operand_assembly(base: int) -> str:
    """Return the assembly that makes a descriptor of ``base`` and a shared address, $1.

    The field for the address has 14 bits. In a cluster an address has the CTA's rank above those of
    the offset: without the mask it would run into the next field.
    """
    high, low = base >> 32, base & 0xFFFFFFFF
    return (
        f"{{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, {ADDRESS_MASK}; or.b32 t, t, {low}; "
        f"mov.b64 $0, {{t, {high}}}; }}"
    )


def mma(accumulator: Int32, a: Int64, b: Int64, instruction: int, accumulate: bool) -> None:
    """Issue one k16 step. Without ``accumulate`` the sums start at zero."""
    asm(
        None,
        [accumulator, a, b],
        "{ .reg .pred leader, p; elect.sync _|leader, 0xffffffff;\n"
        f"setp.ne.b32 p, {int(accumulate)}, 0;\n"
        f"@leader tcgen05.mma.cta_group::1.kind::f16 [$0], $1, $2, {instruction}, p; }}",
        "r,l,l,~{memory}",
    )


def commit(barrier: Int32) -> None:
    """Let the mbarrier get one arrival when all MMAs that this warp has issued have completed."""
    asm(
        None,
        [barrier],
        "{ .reg .pred leader; elect.sync _|leader, 0xffffffff;\n"
        "@leader tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [$0]; }",
        "r,~{memory}",
    )


def commit_multicast(barrier: Int32, ctas: Int32) -> None:
    """Commit to the same barrier of every CTA of the cluster whose bit is set."""
    asm(
        None,
        [barrier, ctas],
        "{ .reg .pred leader; .reg .b16 mask; elect.sync _|leader, 0xffffffff;\n"
        "cvt.u16.u32 mask, $1;\n"
        "@leader tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster"
        ".multicast::cluster.b64 [$0], mask; }",
        "r,r,~{memory}",
    )


# --- order ----------------------------------------------------------------------------------------


def fence_before() -> None:
    """Order this thread's accesses to tensor memory before what it signals next."""
    asm(None, [], "tcgen05.fence::before_thread_sync;", "~{memory}")


def fence_after() -> None:
    """Order this thread's accesses to tensor memory after what it has waited for."""
    asm(None, [], "tcgen05.fence::after_thread_sync;", "~{memory}")
