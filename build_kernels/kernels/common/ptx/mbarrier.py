"""mbarriers in shared memory: 8 bytes each.

A phase of a barrier completes when all its arrivals and all bytes that were expected have come. A
waiter names the parity of the phase: 0 for the first, 1 for the second, and so on in turn. A waiter
that skips a phase can pass early, so every consumer of a ring waits for every phase.
"""

from __future__ import annotations

from cutlass import Int32

from build_kernels.kernels.common.ptx.inline import asm


def init(address: Int32, arrivals: Int32 | int) -> None:
    """Initialise a barrier with ``arrivals`` arrivals per phase. One thread."""
    count = Int32(arrivals)
    asm(None, [address, count], "mbarrier.init.shared.b64 [$0], $1;", "r,r,~{memory}")


def fence_init() -> None:
    """Make initialised barriers visible to the async proxy and to the cluster."""
    asm(None, [], "fence.mbarrier_init.release.cluster;", "~{memory}")


def arrive_expect_tx(address: Int32, transaction_bytes: Int32) -> None:
    """Arrive once, and expect ``transaction_bytes`` bytes of asynchronous copies in this phase."""
    asm(
        None,
        [address, transaction_bytes],
        "mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;",
        "r,r,~{memory}",
    )


def arrive(barrier: Int32) -> None:
    """Arrive on a barrier of this CTA."""
    asm(None, [barrier], "mbarrier.arrive.shared::cta.b64 _, [$0];", "r,~{memory}")


def arrive_remote(barrier: Int32) -> None:
    """Arrive on a barrier of any CTA of the cluster; the address comes from ``map_shared``.

    The release is at CTA scope, which suffices for a thread that has only read and whose reads have
    completed. A release at cluster scope would flush memory each time.
    """
    asm(
        None,
        [barrier],
        "mbarrier.arrive.shared::cluster.b64 _, [$0];",
        "r,~{memory}",
    )


def wait(barrier: Int32, parity: Int32) -> None:
    """Wait until the phase of parity ``parity``, 0 or 1, has completed."""
    asm(
        None,
        [barrier, parity],
        "{ .reg .pred p;\n"
        "WAIT_${:uid}:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n"
        "@!p bra WAIT_${:uid};\n"
        "}",
        "r,r,~{memory}",
    )


def wait_first(address: Int32) -> None:
    """Wait for the first phase, and see what its bytes brought from copies and from peers.

    The acquire is at CTA scope: shared memory has no cache to invalidate, and an acquire at cluster
    scope would invalidate L1 for nothing.
    """
    asm(
        None,
        [address],
        "{ .reg .pred p;\n"
        "WAIT_${:uid}:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0;\n"
        "@!p bra WAIT_${:uid};\n"
        "}",
        "r,~{memory}",
    )
