"""Where operands and sums of the tensor core of sm_100a and sm_103a lie: plain arithmetic.

An operand in shared memory is named by a 64-bit descriptor, the shape and the types of an MMA by a
32-bit one. Sums lie in tensor memory: lane i of it is row i of the MMA, a column is a column.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Rows of an MMA, and hidden elements of one step.
MMA_M = 128
MMA_K = 16

#: Columns of tensor memory of a multiprocessor, and the smallest allocation.
COLUMNS = 512
MIN_COLUMNS = 32

#: Bytes of a core matrix, 8 rows of 8 bf16.
CORE_BYTES = 128

#: Swizzle modes of a descriptor.
NO_SWIZZLE = 0
SWIZZLE_128B = 2

#: The most repetitions of 16 lanes x 256 bits in one load.
MAX_REPEAT = 32


#: The field of a descriptor that holds a shared address, in units of 16 bytes.
ADDRESS_MASK = 0x3FFF


def operand_descriptor(leading_bytes: int, stride_bytes: int, swizzle: int) -> int:
    """Return the descriptor of a K-major bf16 operand at shared address 0.

    An address adds a 16th of it.

    ``stride_bytes`` lie between neighbouring groups of 8 rows. Without a swizzle, ``leading_bytes``
    lie between the two core matrices of a k16 step; with one they are ignored. Raises ValueError
    for what the fields cannot hold.
    """
    for what, found in (("leading", leading_bytes), ("stride", stride_bytes)):
        if found % 16 or not 0 <= found < 1 << 18:
            raise ValueError(f"expected a {what} offset of whole 16 bytes below 256 KiB: {found}")
    version = 1
    return leading_bytes >> 4 << 16 | stride_bytes >> 4 << 32 | version << 46 | swizzle << 61


@dataclass(frozen=True, slots=True)
class Operand:
    """Descriptor at address 0, and the bytes from one k16 step to the next."""

    descriptor: int
    step_bytes: int


#: The weights' packed stages: for 8 experts, 8 core matrices along the hidden dimension.
PACKED_STAGE = Operand(operand_descriptor(CORE_BYTES, 8 * CORE_BYTES, NO_SWIZZLE), 2 * CORE_BYTES)

#: What a tensor map leaves: rows of 128 bytes, swizzled. A stage starts at a multiple of 1024.
SWIZZLED_ROWS = Operand(operand_descriptor(16, 8 * 128, SWIZZLE_128B), MMA_K * 2)


def instruction_descriptor(n: int) -> int:
    """Return the descriptor of D (fp32, 128 x n) += A (bf16, 128 x 16) B (bf16, 16 x n), K-major.

    Raises ValueError unless n is a multiple of 16 from 16 to 256.
    """
    if n % 16 or not 16 <= n <= 256:
        raise ValueError(f"expected 16 to 256 columns in steps of 16, found {n}")
    fp32, bf16 = 1, 1
    return fp32 << 4 | bf16 << 7 | bf16 << 10 | n >> 3 << 17 | MMA_M >> 4 << 24


def allocation(columns: int) -> int:
    """Return how many columns to allocate for ``columns``. Raises ValueError for too many."""
    if not 0 < columns <= COLUMNS:
        raise ValueError(f"expected 1 to {COLUMNS} columns of tensor memory, found {columns}")
    return max(MIN_COLUMNS, 1 << (columns - 1).bit_length())


def repeats(columns: int) -> list[int]:
    """Return how many times 8 columns each load takes: powers of two, the widest first."""
    left, found = columns // 8, []
    while left:
        found.append(min(MAX_REPEAT, 1 << left.bit_length() - 1))
        left -= found[-1]
    return found


def first_lane(warp: int, half: int) -> int:
    """Return the first of 16 lanes of tensor memory: half 0 or 1 of the 32 lanes that a warp of a
    warpgroup reaches."""
    return 32 * warp + 16 * half


def fragment(lane: int, register: int) -> tuple[int, int]:
    """Return (row of 16, column) of what a load leaves in a register of a lane.

    ``wgmma`` and ``mma.sync`` keep their accumulators in the same places.
    """
    eight, half, column = register // 4, register // 2 % 2, register % 2
    return lane // 4 + 8 * half, 8 * eight + 2 * (lane % 4) + column
