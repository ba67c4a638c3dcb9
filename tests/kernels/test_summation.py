"""The order in which the dense kernels add a logit's sums."""

from __future__ import annotations

import itertools

import pytest

from build_kernels.kernels.common.numerics import CONSTANTS, SLICES, dense_tag
from build_kernels.kernels.dense import summation
from build_kernels.kernels.hash_gate import contract as hash_gate
from router_runtime.format.scoring import SCORINGS, scoring_constants
from tests.kernels.summation import SLICES as EXPECTED_SLICES


def bracketed(a: str, b: str) -> str:
    return f"({a}+{b})"


@pytest.mark.parametrize(
    ("chunks", "order"),
    [
        (1, "0"),
        (3, "((0+1)+2)"),
        (4, "(((0+1)+2)+3)"),
        (8, "((((0+1)+(2+3))+(4+5))+(6+7))"),
        (11, "((((0+1)+((2+3)+4))+((5+6)+7))+((8+9)+10))"),
    ],
)
def test_chunks_make_slices_and_slices_the_total(chunks: int, order: str) -> None:
    terms = [str(chunk) for chunk in range(chunks)]
    assert summation.add_chunks(terms, bracketed) == order


@pytest.mark.parametrize("chunks", range(1, 40))
def test_every_way_to_ask_for_the_slices_agrees(chunks: int) -> None:
    slices = summation.slice_chunks(chunks)
    assert list(itertools.chain(*slices)) == list(range(chunks))
    assert len(slices) == min(SLICES, chunks)
    ends = [summation.slice_end(number, chunks) for number in range(-1, len(slices))]
    assert list(itertools.pairwise(ends)) == [(own.start, own.stop) for own in slices]


def test_the_tree_is_part_of_the_tag() -> None:
    assert SLICES == EXPECTED_SLICES
    constants = {**CONSTANTS, "MMA": "wgmma", **scoring_constants("sqrtsoftplus", 1.0)}
    assert dense_tag(constants) == "bf16-k16-f32/chunk256/slices4/epilogue1"


def test_how_an_entry_scores_is_part_of_the_tag() -> None:
    tags = {
        dense_tag({**CONSTANTS, "MMA": "wgmma", **scoring_constants(function, temperature)})
        for function in SCORINGS
        for temperature in (1.0, 2.0, 2.0 + 2**-22)
    }
    assert len(tags) == 2 * 3


def test_hash_gate_has_the_tag_of_the_dense_kernels() -> None:
    constants = {**CONSTANTS, **scoring_constants("sqrtsoftplus", 1.0)}
    assert hash_gate.numerics(constants) == dense_tag({**constants, "MMA": "mma_sync"})
    assert hash_gate.derive({**constants, "HIDDEN": 4096, "EXPERTS": 256, "TOP_K": 6}) == {
        "WARPS": 12,
        "EXPERT_WARPS": 3,
        "SLICES": SLICES,
    }
