"""Coordinates in a cluster, and the cluster barriers of forms whose CTAs read each other's logits.

``cluster_e`` CTAs share the tokens of a tile; a cluster has ``cluster`` CTAs. All threads of a CTA
call the two waits, in this order.
"""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32, cute


class Cta(NamedTuple):
    """Which experts, share of the hidden dimension and tile of tokens of the cluster a CTA has."""

    e_rank: Int32
    k_rank: Int32
    t_rank: Int32


def wait_for_logits(cluster_e: int, cluster: int) -> None:
    """Wait until all CTAs of the cluster have stored their logits and candidates.

    With one CTA per tile there is nothing to wait for: this only arrives.
    """
    if cluster_e > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    elif cluster > 1:
        cute.arch.cluster_arrive_relaxed()


def wait_before_exit(cluster_e: int, cluster: int) -> None:
    """Wait until no CTA of the cluster uses this CTA's shared memory or barriers any longer."""
    if cluster_e > 1:
        cute.arch.cluster_arrive_relaxed()
    if cluster > 1:
        cute.arch.cluster_wait()
