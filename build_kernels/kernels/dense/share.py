"""What a k rank of the form swap_ab multiplies: its share of the hidden dimension.

Counts that are the same for all k ranks are Python integers, others are values of the device code.
So where slices are even, the number of blocks is a constant of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Int32

from build_kernels.kernels.common.ptx import arith
from build_kernels.kernels.dense import summation
from build_kernels.kernels.dense.geometry.common import ceil_div
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry

#: Numbers of whole and of short chunks.
Chunks = tuple[Int32 | int, Int32 | int]


def of_rank(values: Sequence[int], k_rank: Int32) -> Int32 | int:
    """Return the one of ``values``, one per k rank, that belongs to ``k_rank``."""
    if len(set(values)) == 1:
        return values[0]
    found = Int32(values[0])
    for rank, value in enumerate(values[1:], 1):
        found = arith.select(arith.equal(k_rank, Int32(rank)), Int32(value), found)
    return found


def k_blocks(g: SwapAbGeometry, k_rank: Int32) -> Int32 | int:
    """Return how many 64-element blocks a k rank multiplies: the fillings of its ring."""
    return of_rank(g.share_k_blocks, k_rank)


def k_block_of(g: SwapAbGeometry, number: Int32, k_rank: Int32) -> Int32:
    """Return which 64-element block of the hidden dimension is filling ``number`` (from 0) of the
    ring of a k rank."""
    if g.split_k == 1:
        return number
    if g.even:
        blocks = len(g.slices[0])
        own = arith.quotient(number, blocks) * g.split_k + k_rank
        return own * blocks + arith.remainder(number, blocks)
    found = number
    for turn in range(g.cta_slices):
        before = [sum(len(own) for own in share[:turn]) for share in g.shares]
        # Blocks of other k ranks, which this one skips.
        skipped = [share[turn].start - count for share, count in zip(g.shares, before, strict=True)]
        block = number + of_rank(skipped, k_rank)
        if turn == 0:
            found = block
        else:
            found = arith.select(arith.less(number, Int32(of_rank(before, k_rank))), found, block)
    return found


def chunks(g: SwapAbGeometry, blocks: Sequence[int], k_rank: Int32) -> Chunks:
    """Return how many whole chunks, and how many short ones (0 or 1), the blocks make that a k rank
    multiplies. ``blocks`` are their numbers for each k rank."""
    whole = of_rank([count // g.chunk_k_blocks for count in blocks], k_rank)
    short = of_rank([int(count % g.chunk_k_blocks > 0) for count in blocks], k_rank)
    return whole, short


def chunks_of_share(g: SwapAbGeometry, k_rank: Int32) -> Chunks:
    """Return the chunks of all slices of a k rank. The short one is the last."""
    return chunks(g, g.share_k_blocks, k_rank)


def chunks_of_turn(g: SwapAbGeometry, turn: int, k_rank: Int32) -> Chunks:
    """Return the chunks of the slice that a k rank multiplies in a turn."""
    return chunks(g, [len(share[turn]) for share in g.shares], k_rank)


def chunks_of_slice(g: SwapAbGeometry, run: range, number: Int32) -> Chunks:
    """Return the chunks of slice ``number``, one of ``run`` (of ``g.runs``), where one CTA
    multiplies all slices."""
    blocks = {len(g.slices[own]) for own in run}
    if len(blocks) == 1:
        return chunks(g, [*blocks], Int32(0))
    last = ceil_div(g.hidden, g.k_chunk)
    return summation.slice_end(number, last) - summation.slice_end(number - 1, last), 0
