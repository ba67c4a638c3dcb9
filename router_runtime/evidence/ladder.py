"""The ladder of evidence: the statuses that an entry can have, and which of them serve."""

from __future__ import annotations

import typing
from typing import Literal

#: - ``verified``: a record of a device with the same compute capability names the digest of this
#:   very cubin.
#: - ``source-verified``: a record of another member of the family does, or a record is about a
#:   cubin for another target, of the same sources and the same toolchain.
#: - ``emulated``: a record of emulation names the digest of this very cubin.
#: - ``unproven``: none of these.
Status = Literal["verified", "source-verified", "emulated", "unproven"]

#: The best first.
STATUSES: tuple[Status, ...] = typing.get_args(Status)

#: Statuses that serve if the caller accepts them, by ``Router(..., accept=...)``.
ACCEPTABLE = ("emulated",)

#: The statuses that serve by default -> rank; the smaller one is preferred.
_RANKS = {"verified": 0, "source-verified": 1}


def serves(status: str, accept: str | None = None) -> bool:
    """Return whether an entry of this status serves although no caller has named its variant.

    ``accept`` is a status that the caller accepts beside those that serve by default.
    """
    return status in _RANKS or (status == accept and status in ACCEPTABLE)


def status_rank(status: str, accept: str | None = None) -> int:
    """Return how good the evidence of this status is: the smaller, the better.

    A status that the caller accepts counts as much as ``source-verified``, so that the latency
    decides between entries of the two: otherwise one portable entry that serves every batch would
    keep all that were accepted from serving.
    """
    if status in _RANKS:
        return _RANKS[status]
    return _RANKS["source-verified"] if serves(status, accept) else len(_RANKS)
