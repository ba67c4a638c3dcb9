"""The methods that a form calls on its MMA object: a base class for each form except decode.

An object is made on the host with the form's geometry. Methods that a kind of MMA does not need do
nothing here. "All threads" are those of the CTA unless the text says otherwise; a warp calls as a
whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.geometry.common import LANES, WARPGROUP
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.ring import Ring


class SplitKMma(ABC):
    """Multiplies all chunks of a CTA's share, 64 experts and one chunk per warpgroup."""

    def __init__(self, geometry: SplitKGeometry) -> None:
        self.g: Any = geometry

    def allocate(self, shared: Int32, warp: Int32) -> None:
        """Set up what the MMA needs beside registers: its barriers, its tensor memory.

        Called by all threads, before the CTA's first barrier.
        """
        return

    @abstractmethod
    def multiply(
        self, shared: Int32, weight_full: Int32, hidden_full: Int32, warp: Int32
    ) -> Sequence[Float32]:
        """Return this warp's partial sums of 16 experts x the tile's tokens.

        All warps call this. It waits for the operands: the weights' stages begin at ``shared``,
        those of the hidden states behind them; their full barriers at ``weight_full`` and
        ``hidden_full``.
        """

    @abstractmethod
    def first_row(self, warp: Int32) -> Int32:
        """Return the first of the 16 experts of the group whose sums a warp has."""

    def free(self, shared: Int32, warp: Int32) -> None:
        """Give back what ``allocate`` took. All warps, after a barrier behind ``multiply``."""
        return

    def task(self, warp: Int32) -> tuple[Int32, Int32]:
        """Return (m-tile, chunk of the share) of a warp's warpgroup."""
        number = arith.quotient(warp, WARPGROUP // LANES)
        return arith.remainder(number, self.g.m_tiles), arith.quotient(number, self.g.m_tiles)


class SwapAbMma(ABC):
    """Multiplies the experts of a CTA by the tile's tokens, one chunk at a time."""

    def __init__(self, geometry: SwapAbGeometry) -> None:
        self.g: Any = geometry

    @property
    @abstractmethod
    def hidden_releases(self) -> int:
        """Arrivals of one CTA that release the hidden states of a stage."""

    @property
    @abstractmethod
    def weight_releases(self) -> int:
        """Arrivals of one CTA that release the weights of a stage."""

    def allocate(self, shared: Int32, warp: Int32) -> None:
        """Set up what the MMA needs beside registers: its barriers, its tensor memory.

        Called by all threads, before the CTA's first barrier.
        """
        return

    def issue(self, shared: Int32, hidden: Ring, weight: Ring, cta: Cta, warp: Int32) -> None:
        """Issue the MMAs, if a warp of its own does. All producer warps call this."""
        return

    @abstractmethod
    def first_row(self, warp: Int32) -> Int32:
        """Return the first of the 16 experts of the CTA whose sums a warp has."""

    @abstractmethod
    def bind(
        self, shared: Int32, hidden: Ring, weight: Ring, cta: Cta, warp: Int32, thread: Int32
    ) -> BoundSwapAbMma:
        """Return the multiplication of a consumer warp. All consumer threads call this first."""


class BoundSwapAbMma(ABC):
    """The multiplication as one consumer warp sees it: 16 experts x the tile's tokens.

    A state says which chunk comes next. The DSL carries it through loops.
    """

    @abstractmethod
    def begin(self) -> Any:
        """Return the state before the first chunk."""

    @abstractmethod
    def chunk(self, state: Any, blocks: int, meanwhile: Callable[[], None] | None) -> Any:
        """Multiply the next chunk, of ``blocks`` stages, from zero. Returns the state behind it.

        It waits for the stages, and they are released when the MMAs have read them. ``meanwhile``
        is called once, under the MMAs.
        """

    @abstractmethod
    def add_to(self, state: Any, sums: cute.Tensor) -> None:
        """Add the sums of the chunk before ``state`` to this thread's ``sums``.

        They are four for each n-tile of 8 tokens, in the layout of mma.m16n8. Called once after
        each chunk.
        """


class TileMma(ABC):
    """Multiplies the whole hidden dimension of 128 tokens x a CTA's experts."""

    def __init__(self, geometry: TileGeometry) -> None:
        self.g: Any = geometry

    @property
    @abstractmethod
    def releases(self) -> int:
        """Arrivals of one CTA that release a stage of hidden states."""

    @property
    def weight_releases(self) -> int:
        """Arrivals of all CTAs that release a stage of weights."""
        return self.releases * int(self.g.cluster_t)

    def allocate(self, shared: Int32, warp: Int32) -> None:
        """Set up what the MMA needs beside registers: its barriers, its tensor memory.

        Called by all threads, before the CTA's first barrier.
        """
        return

    def issue(
        self, shared: Int32, hidden: Ring, weight: Ring, e_rank: Int32, t_rank: Int32, warp: Int32
    ) -> None:
        """Issue the MMAs, if a warp of its own does. All producer warps call this."""
        return

    @abstractmethod
    def multiply(
        self, shared: Int32, hidden: Ring, weight: Ring, e_rank: Int32, t_rank: Int32, thread: Int32
    ) -> list[Any]:
        """Return this thread's logits of two tokens: for each pass, ``mma_n`` / 2 of them.

        All consumer threads call this. A stage's release arrives at the empty barriers of every CTA
        that fills it. On return all stages have been read by this warp.
        """

    @abstractmethod
    def store_logits(
        self, totals: Sequence[Sequence[Float32]], shared: Int32, thread: Int32
    ) -> None:
        """Store this thread's logits as rows of tokens, from the address ``shared`` on.

        All consumer threads call this, when the rings are no longer needed.
        """
