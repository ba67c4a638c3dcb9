"""Which experts the dense kernels take for a token that selects none: their code, run on a model
of a CTA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.compile.sources import PACKAGE
from build_kernels.kernels.common.parameters import DENSE_ROUTING
from tests.kernels.ptx_machine import Block, Program
from tests.kernels.tensor_core import Memory

#: Those of look_up_probe.py, which needs a process of its own.
TOP_K, EXPERTS, SELECTS = 6, 40, -2
VOCAB, TOKENS = 9, 8

RANDOM = np.random.default_rng(5)
TABLE = RANDOM.integers(0, EXPERTS, (VOCAB, TOP_K)).astype(np.int32)
TOKEN_IDS = np.array([0, VOCAB - 1, VOCAB, -1, 2**32, 2**32 + 3, 4, -(2**63)], np.int64)
GIVEN = RANDOM.integers(0, EXPERTS, (TOKENS, TOP_K))
GIVEN[1, 2], GIVEN[4, 0], GIVEN[6, 5] = EXPERTS, -1, 2**32
IMAGES = np.array([0, 1, 0, 0, 1, 0, 0, 1], np.uint8)
MASK = np.array([0, 0, 1, 0, 1, 1, 0, 0], np.uint8)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Program:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.look_up_probe"],
        # The DSL leaves PTX and cubin in the folder where it runs.
        cwd=tmp_path_factory.mktemp("probe"),
        env={**os.environ, "CUTE_DSL_ARCH": "sm_90a", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return Program(done.stdout)


def found(probe: Program, **inputs: NDArray[Any] | int) -> NDArray[np.int32]:
    memory = Memory()
    arguments: dict[str, int] = dict.fromkeys((each.name for each in DENSE_ROUTING), 0)
    for name, value in {**inputs, "vocab": VOCAB, "tokens": TOKENS}.items():
        arguments[name] = memory.add(value) if isinstance(value, np.ndarray) else value
    arguments["ids_out"] = memory.add(np.zeros((TOKENS, TOP_K), np.int32))
    for token in range(TOKENS):
        Block(probe, 32, memory).run(token, [arguments[each.name] for each in DENSE_ROUTING])
    return memory.arrays[-1].view(np.int32).reshape(TOKENS, TOP_K)


def looked_up(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    inside = (token_ids >= 0) & (token_ids < VOCAB)
    rows: NDArray[np.int64] = TABLE[np.where(inside, token_ids, 0)].astype(np.int64)
    return np.where(inside[:, None], rows, -1)


def given() -> NDArray[np.int64]:
    return np.where((GIVEN >= 0) & (GIVEN < EXPERTS), GIVEN, -1)


def test_without_a_table_and_given_experts_a_token_selects(probe: Program) -> None:
    assert (found(probe, image_mask=IMAGES) == SELECTS).all()
    assert (found(probe, given_ids_i64=GIVEN) == given()).all()
    masked = found(probe, given_ids_i32=GIVEN.astype(np.int32), given_mask=MASK)
    narrow = np.where(GIVEN == 2**32, 0, given())
    assert (masked == np.where(MASK[:, None] == 1, narrow, SELECTS)).all()


@pytest.mark.parametrize("wide", [False, True])
def test_the_table_has_the_experts_of_a_token_id(probe: Program, wide: bool) -> None:
    token_ids = TOKEN_IDS if wide else TOKEN_IDS.astype(np.int32)
    inputs: dict[str, Any] = {"table": TABLE, f"token_ids_i{64 if wide else 32}": token_ids}
    expected = looked_up(token_ids.astype(np.int64))
    assert (found(probe, **inputs) == expected).all()
    images = np.where(IMAGES[:, None] == 1, SELECTS, expected)
    assert (found(probe, **inputs, image_mask=IMAGES) == images).all()


def test_given_experts_take_the_place_of_the_tables_and_of_an_images_choice(
    probe: Program,
) -> None:
    inputs: dict[str, Any] = {"table": TABLE, "token_ids_i64": TOKEN_IDS, "given_ids_i64": GIVEN}
    assert (found(probe, **inputs, image_mask=IMAGES) == given()).all()
    others = np.where(IMAGES[:, None] == 1, SELECTS, looked_up(TOKEN_IDS))
    expected = np.where(MASK[:, None] == 1, given(), others)
    assert (found(probe, **inputs, image_mask=IMAGES, given_mask=MASK) == expected).all()
