"""hash_gate's own code, run on a model of a CTA: every token gets the logits of the dense kernels,
added in their order, for any shape of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.compile import nvrtc
from build_kernels.compile.sources import KERNELS, headers
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.hash_gate import contract
from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants
from tests.kernels.ptx_machine import Block, Program
from tests.kernels.summation import tree, uneven
from tests.kernels.tensor_core import Memory, Sums, to_bf16

VOCAB = 50
#: Two inside the vocabulary, and one behind it.
TOKEN_IDS = (7, VOCAB - 1, VOCAB)
TOKENS = len(TOKEN_IDS)

#: hidden, experts, top_k, and the warps for each group of chunks if they are stated: chunks side by
#: side 4, 2 and 1 at a time; a short last one; fewer and more experts than columns.
SHAPES = (
    (4096, 20, 6, None),
    (3072, 20, 9, 1),
    (1536, 12, 6, None),
    (1152, 16, 16, 1),
    (64, 8, 3, None),
    (1024, 33, 32, None),
)


def constants_of(
    hidden: int, experts: int, top_k: int, expert_warps: int | None = None, images: int = 0
) -> dict[str, int | float | str]:
    stated: dict[str, int | float | str] = {
        **CONSTANTS,
        **scoring_constants(SQRT_SOFTPLUS, 1.0),
        "HIDDEN": hidden,
        "EXPERTS": experts,
        "TOP_K": top_k,
        "IMAGES": images,
    }
    if expert_warps is not None:
        stated["EXPERT_WARPS"] = expert_warps
    derived = contract.derive(stated)
    assert derived is not None
    return {**derived, **stated}


def compiled(constants: Mapping[str, int | float | str]) -> Program:
    source = (KERNELS / "hash_gate" / "hash_gate.cu").read_text()
    return Program(
        nvrtc.compile_ptx("hash_gate", source, headers("hash_gate"), constants, "compute_90a")
    )


class Gate:
    """Drawn inputs of a shape, and the kernel that runs on them. A logit depends on the order of
    its sums.
    """

    def __init__(self, constants: Mapping[str, Any]) -> None:
        self.constants = constants
        self.contract = contract.contract(constants)
        hidden, experts = constants["HIDDEN"], constants["EXPERTS"]
        random = np.random.default_rng(hidden)
        self.top_k = constants["TOP_K"]

        def whole(*shape: int) -> Sums:
            return random.integers(-4, 5, shape).astype(np.float32)

        # Sums of a chunk are exact: whole numbers of less than 24 bits, scaled. Two large chunks
        # cancel: what the others lose beside each of them stays.
        self.x = uneven(whole(TOKENS, hidden), 256, random) * np.float32(2**-10)
        self.weight = whole(experts, hidden)
        if hidden >= 4 * 256:
            first, last = slice(256), slice(hidden // 512 * 256, hidden // 512 * 256 + 256)
            self.x[:, first] = whole(TOKENS, 256) * np.float32(2**18)
            self.x[:, last] = -self.x[:, first]
            self.weight[:, last] = self.weight[:, first]
        self.table = random.integers(0, experts, (VOCAB, self.top_k)).astype(np.int32)
        self.image_bias = random.normal(size=experts).astype(np.float32)
        self.logits = tree(self.weight, self.x, 256)

    def run(self, **inputs: Any) -> tuple[Sums, NDArray[np.int32]]:
        """Return the weights, before they are divided by their sum, and the ids."""
        memory = Memory()
        (recipe,) = self.contract.repacks
        packed = to_bf16(self.weight).reshape(recipe.shape).transpose(recipe.order)
        weights = np.zeros((TOKENS, self.top_k), np.float32)
        arguments = dict.fromkeys((each.name for each in self.contract.parameters), 0)
        given: dict[str, Any] = {
            "hidden_states": to_bf16(self.x),
            "token_ids_i64": np.array(TOKEN_IDS, np.int64),
            "packed_weight": packed,
            "table": self.table,
            "image_bias": self.image_bias,
            "row_stride": self.constants["HIDDEN"],
            **{"vocab": VOCAB, "tokens": TOKENS, "scale": 1.0, "sentinel": -9},
            **inputs,
        }
        for name, value in given.items():
            arguments[name] = memory.add(value) if isinstance(value, np.ndarray) else value
        arguments["weights_out"] = memory.add(weights)
        arguments["ids_out"] = memory.add(np.zeros((TOKENS, self.top_k), np.int32))
        program = compiled(self.constants)
        for token in range(TOKENS):
            block = Block(program, self.contract.block[0], memory)
            block.run(token, [arguments[each.name] for each in self.contract.parameters])
        found: Sums = memory.arrays[-2].view(np.float32).reshape(weights.shape)
        ids: NDArray[np.int32] = memory.arrays[-1].view(np.int32).reshape(weights.shape)
        return found, ids

    def scores(self, token: int) -> NDArray[np.float64]:
        logits = self.logits[token].astype(np.float64)
        found: NDArray[np.float64] = np.sqrt(
            np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
        )
        return found

    def check(self, weights: Sums, ids: NDArray[np.int32], expected: Mapping[int, Any]) -> None:
        """Compare with the scores of the experts of each token; -1 is no expert."""
        for token, experts in expected.items():
            chosen = np.array(experts)
            assert ids[token].tolist() == np.where(chosen < 0, -9, chosen).tolist()
            scores = np.where(chosen < 0, 0, self.scores(token)[chosen])
            np.testing.assert_allclose(weights[token], scores, rtol=1e-6, atol=1e-22)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_of_the_table(shape: tuple[int, int, int, int | None]) -> None:
    gate = Gate(constants_of(*shape))
    none = [-1] * gate.top_k
    gate.check(*gate.run(), {0: gate.table[7], 1: gate.table[VOCAB - 1], 2: none})


def test_another_order_of_the_sums_shows() -> None:
    gate = Gate({**constants_of(2048, 20, 6), "SLICES": 2})
    with pytest.raises(AssertionError):
        gate.check(*gate.run(), {0: gate.table[7], 1: gate.table[VOCAB - 1]})


@pytest.mark.parametrize("shape", [(1024, 40, 6), (320, 40, 6)], ids=str)
def test_images_and_given_experts(shape: tuple[int, int, int]) -> None:
    """An image selects among all experts, whatever its token id; a given id may be no expert."""
    gate = Gate(constants_of(*shape, images=1))
    given = np.array([[3, 1, shape[1], 0, -1, 5]] * TOKENS, np.int32)
    found = gate.run(
        serving=1,
        image_mask=np.array([1, 0, 1], np.uint8),
        given_ids_i32=given,
        given_mask=np.array([0, 1, 0], np.uint8),
    )
    best = {
        token: np.argsort(-(gate.scores(token) + gate.image_bias), kind="stable")[: gate.top_k]
        for token in (0, 2)
    }
    gate.check(*found, {**best, 1: [3, 1, -1, 0, -1, 5]})
