"""What the geometries of all dense forms share: sizes of the hardware, and reading constants.

A geometry says how a form divides one router among CTAs and warps, and where everything lies in
shared memory. It is plain arithmetic on compile-time constants, read by the launch contract and by
the device code alike. Bytes and offsets are those of one CTA's dynamic shared memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from router_runtime.format.contract import Constants

#: Threads of a warp and of a warpgroup.
LANES = 32
WARPGROUP = 128

#: Hidden elements of one MMA step (k16), and of one stage of a ring: 128 bytes, the width of the
#: 128-byte swizzle.
MMA_K = 16
K_BLOCK = 64

#: Rows of one ``wgmma``.
MMA_M = 64

#: Dynamic shared memory of one CTA on every target, in bytes.
MAX_SHARED_BYTES = 227 * 1024

#: Bytes of one mbarrier.
BARRIER_BYTES = 8

#: Most CTAs of a cluster.
MAX_CLUSTER = 16


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def screening_groups(top_k: int) -> int:
    """Return how many groups of a CTA's experts give a token's threshold.

    A power of two, at least four times ``top_k``. With k = 6 and 128 experts, 6.4 are candidates on
    average; with half as many groups 7.1, with a quarter 10.
    """
    return 1 << (4 * top_k - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """The router's shape: ``hidden`` elements, ``experts``, ``top_k``, chunks of ``k_chunk``.

    A subclass adds the constants of its form as fields; a field is the constant of the same name in
    capitals.
    """

    hidden: int
    experts: int
    top_k: int
    k_chunk: int

    @classmethod
    def of(cls, constants: Constants) -> Self:
        """Return the geometry of an entry's constants. Raises ValueError if it cannot be built."""
        fields = dataclasses.fields(cls)
        found = cls(**{field.name: int(constants[field.name.upper()]) for field in fields})
        found.check()
        return found

    def check(self) -> None:
        """Raise ValueError, with what was expected and found, if the form cannot do this."""

    def constants(self, *names: str) -> dict[str, int]:
        """Return the fields ``names`` as compile-time constants, which ``of`` reads back."""
        return {name.upper(): getattr(self, name) for name in names}

    @property
    def chunk_k_blocks(self) -> int:
        """Stages of one chunk."""
        return self.k_chunk // K_BLOCK


@dataclass(frozen=True)
class GroupedGeometry(Geometry):
    """A division of the experts among ``groups`` clusters, each with ``group_experts`` of them.

    The last cluster to finish a token merges the groups' candidates (common/epilogue.py), through a
    workspace that holds at most ``max_tokens`` tokens.
    """

    max_tokens: int
    groups: int

    @property
    def group_experts(self) -> int:
        """Experts of one group, padding included."""
        raise NotImplementedError

    @property
    def padded_experts(self) -> int:
        """Experts of all groups, padding included: rows of the packed weights."""
        return self.group_experts * self.groups

    @property
    def lane_keys(self) -> int:
        """Keys of one token that each lane of a warp holds."""
        return ceil_div(self.group_experts, LANES)

    @property
    def ticket_bytes(self) -> int:
        """Bytes of the workspace's tickets, one 32-bit word per token."""
        return ceil_div(self.max_tokens * 4, 16) * 16

    @property
    def workspace_bytes(self) -> int:
        """The tickets, then one 16-byte record per token, group and rank."""
        if self.groups == 1:
            return 0
        return self.ticket_bytes + self.max_tokens * self.groups * self.top_k * 16
