"""Contracts of the CUDA C++ kernels against their sources and against each other."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

import pytest

from build_kernels.catalog.kernels import KERNELS as KERNELS_OF_CATALOG
from build_kernels.catalog.targets import TARGETS
from build_kernels.compile.sources import KERNELS
from build_kernels.kernels.common.parameters import DENSE_ROUTING, LOOKUP, ROUTING
from build_kernels.kernels.dense.contract import MAX_TOKENS
from build_kernels.plan import plan
from router_runtime.format.contract import Constants, Contract, GridAxis, validate_contract
from tests.bench.topk_variants import CANDIDATES, candidates

CONSTANTS: Mapping[str, Mapping[str, int]] = {
    "hash_router": {"THREADS": 128, "TOKENS_PER_BLOCK": 32},
    "hash_gate": {"WARPS": 12, "HIDDEN": 4096, "EXPERTS": 256, "TOP_K": 6, "K_CHUNK": 256},
    "activation_topk": {"EXPERTS_CAPACITY": 384, "TOKENS_PER_BLOCK": 4},
    "topk_select": {"VALUES_PER_LANE": 32, "WARPS_PER_ROW": 8, "BLOCKS_PER_ROW": 8, "THREADS": 256},
    "topk_indices": {
        **{"SCORE_BYTES": 4, "BLOCKS_PER_ROW": 8, "BLOCKS_PER_SM": 1, "THREADS": 512, "LOADS": 8},
        **{"STAGES": 2, "CAPACITY": 8192, "MAX_TOP_K": 4096, "HELD": 0},
    },
}
#: Parameters that a kernel reads as integers: bits of numbers, or one of two types.
AS_BITS = {("topk_indices", "scores"): "ptr:f32", ("topk_indices", "values_out"): "ptr:f32"}
#: What may be indexed before the dependency wait: shared memory.
SHARED = ("__shared__ SelectionScratch scratch[",)
TYPES = {"float*": "ptr:f32", "int*": "ptr:i32", "long long*": "ptr:i64"} | {
    "unsigned char*": "ptr:u8",
    "short*": "ptr:i16",
    "bf16*": "ptr:bf16",
    "int": "i32",
    "long long": "i64",
    "float": "f32",
}


def contract_of(kernel: str, **constants: int) -> Contract:
    module = importlib.import_module(f"build_kernels.kernels.{kernel}.contract")
    found = module.contract({**CONSTANTS[kernel], **constants})
    assert isinstance(found, Contract)
    return found


@pytest.mark.parametrize("kernel", CONSTANTS)
def test_parameters_are_the_signature(kernel: str) -> None:
    source = (KERNELS / kernel / f"{kernel}.cu").read_text()
    (signature,) = re.findall(rf'extern "C" __global__[^;{{]*?\b{kernel}\(([^)]*)\)', source)
    declared = []
    for parameter in signature.split(","):
        kind, name = parameter.replace("const", "").strip().rsplit(maxsplit=1)
        declared.append((name, AS_BITS.get((kernel, name)) or TYPES[" ".join(kind.split())]))
    contract = contract_of(kernel)
    assert declared == [(parameter.name, parameter.type) for parameter in contract.parameters]
    validate_contract(contract, kernel)


@pytest.mark.parametrize("kernel", CONSTANTS)
def test_dependency_wait_comes_before_any_return(kernel: str) -> None:
    source = (KERNELS / kernel / f"{kernel}.cu").read_text()
    body = source[source.index('extern "C" __global__') :]
    assert contract_of(kernel).programmatic_dependent_launch
    before, _, _ = body.partition("griddepcontrol_wait();")
    assert before != body
    assert "return" not in before
    indexed = before.split("{", 1)[1]
    for shared in SHARED:
        indexed = indexed.replace(shared, "")
    assert "[" not in indexed


@pytest.mark.parametrize("kernel", CONSTANTS)
def test_no_pointer_is_restrict(kernel: str) -> None:
    """Restrict makes the compiler read through the non-coherent cache: stale under PDL."""
    source = (KERNELS / kernel / f"{kernel}.cu").read_text()
    code = re.sub(r"//.*", "", source)
    assert "__restrict__" not in code
    assert "__ldg" not in code


@pytest.mark.parametrize("kernel", ["dense_router_decode", "dense_router_prefill"])
def test_dense_contracts_end_with_the_routing_parameters(kernel: str) -> None:
    """The kernels take them as one argument, their last."""
    module = importlib.import_module(f"build_kernels.kernels.{kernel}.contract")
    for job in plan(targets=TARGETS, kernels=[kernel]):
        contract = module.contract(job.constants)
        assert contract.parameters[-len(DENSE_ROUTING) :] == DENSE_ROUTING


def test_the_look_up_is_what_dense_kernels_have_beside() -> None:
    own = tuple(each for each in DENSE_ROUTING if each.name in LOOKUP)
    assert (*ROUTING, *own) == DENSE_ROUTING
    gate = contract_of("hash_gate")
    assert gate.limits == {"tokens": (1, MAX_TOKENS)}
    assert {(each.name, each.type) for each in own} <= {
        (each.name, each.type) for each in gate.parameters
    }


@pytest.mark.parametrize(
    ("hidden", "top_k", "images", "warps", "expert_warps"),
    [
        (4096, 6, 0, 12, 3),
        (7168, 6, 0, 14, 2),
        (2560, 6, 0, 10, 2),
        (2688, 6, 0, 11, 1),
        (2688, 16, 0, 11, 1),
        (64, 6, 0, 1, 1),
        (64 * 1024, 6, 1, 5, 1),
        (320 * 256, 6, 1, 1, 1),
    ],
)
def test_hash_gate_has_the_warps_that_fit(
    hidden: int, top_k: int, images: int, warps: int, expert_warps: int
) -> None:
    from build_kernels.kernels.hash_gate.contract import derive

    given = {"HIDDEN": hidden, "EXPERTS": 1024, "TOP_K": top_k, "K_CHUNK": 256, "IMAGES": images}
    assert derive(given) == {"WARPS": warps, "EXPERT_WARPS": expert_warps, "SLICES": 4}


def test_hash_gate_has_no_second_variant_where_it_would_be_the_first() -> None:
    from build_kernels.kernels.hash_gate.contract import derive

    given = {"HIDDEN": 2688, "EXPERTS": 64, "TOP_K": 8, "K_CHUNK": 256, "EXPERT_WARPS": 1}
    assert derive(given) is None
    assert derive({**given, "TOP_K": 9}) is not None
    with pytest.raises(ValueError, match="HIDDEN to be at most 81920"):
        derive({**given, "HIDDEN": 81984})


def test_activation_topk_has_a_warp_a_token() -> None:
    contract = contract_of("activation_topk")
    assert contract.block == (128, 1, 1)
    assert contract.grid[0] == GridAxis("ceil", 1, "tokens", 4)
    assert contract.limits["experts"] == (1, 384)


@pytest.mark.parametrize(
    ("constants", "capacity", "grid", "cluster"),
    [
        ((8, 1, 1, 128), 256, GridAxis("ceil", 1, "rows", 4), 1),
        ((32, 1, 1, 128), 1024, GridAxis("ceil", 1, "rows", 4), 1),
        ((32, 8, 1, 256), 8192, GridAxis("ceil", 1, "rows", 1), 1),
        ((32, 8, 8, 256), 65536, GridAxis("ceil", 8, "rows", 1), 8),
    ],
)
def test_topk_select_geometry(
    constants: tuple[int, int, int, int], capacity: int, grid: GridAxis, cluster: int
) -> None:
    names = ("VALUES_PER_LANE", "WARPS_PER_ROW", "BLOCKS_PER_ROW", "THREADS")
    contract = contract_of("topk_select", **dict(zip(names, constants, strict=True)))
    assert contract.limits["row_length"] == (1, capacity)
    assert contract.grid[0] == grid
    assert contract.cluster == (cluster, 1, 1)
    # The grid's x extent is an int of 31 bits.
    assert contract.limits["rows"][1] * cluster <= 2**31 - 1


@pytest.mark.parametrize(("score_bytes", "kind"), [(4, "ptr:f32"), (2, "ptr:bf16")])
@pytest.mark.parametrize("blocks", [1, 16])
def test_topk_indices_geometry(score_bytes: int, kind: str, blocks: int) -> None:
    constants = {"SCORE_BYTES": score_bytes, "BLOCKS_PER_ROW": blocks}
    contract = contract_of("topk_indices", **constants)
    assert contract.parameters[0].type == kind
    assert contract.grid[0] == GridAxis("ceil", blocks, "rows", 1)
    assert contract.cluster == (blocks, 1, 1)
    assert contract.limits["row_length"] == (1, 2**21)
    assert contract.limits["top_k"] == (1, 4096)
    assert contract.limits["rows"][1] * blocks <= 2**31 - 1
    # Two chunks of 8 vectors a lane, and the list.
    assert contract.dynamic_shared_memory == 2 * 8 * 16 * 512 + 8 * 8192


@pytest.mark.parametrize(
    ("held", "score_bytes", "blocks", "threads", "longest"),
    [(4, 4, 1, 512, 8192), (16, 4, 8, 512, 2**18), (8, 2, 1, 256, 16384)],
)
def test_topk_indices_holds_what_the_threads_of_a_cluster_hold(
    held: int, score_bytes: int, blocks: int, threads: int, longest: int
) -> None:
    constants = {"HELD": held, "SCORE_BYTES": score_bytes, "BLOCKS_PER_ROW": blocks}
    contract = contract_of("topk_indices", **constants, THREADS=threads)
    assert contract.limits["row_length"] == (1, longest)
    # The candidates of a row, for results in rank order.
    assert contract.dynamic_shared_memory == 8 * 4096


@pytest.mark.parametrize("form", ["held", "streamed"])
def test_topk_indices_prepares_nothing_but_shared_memory(form: str) -> None:
    """What comes before the dependency wait is given nothing that refers to other memory."""
    folder = KERNELS / "topk_indices"
    before, _, _ = (folder / "topk_indices.cu").read_text().partition("griddepcontrol_wait();")
    body = before.rsplit("{", 1)[1]
    calls = re.findall(r"(\w+)\(([^)]*)\);", body)
    assert calls == [("griddepcontrol_launch_dependents", ""), ("prepare", "shared")]
    source = (folder / f"{form}.cuh").read_text()
    assert "__device__ __forceinline__ void prepare(Shared& shared) {" in source


def fits_the_multiprocessor(constants: Constants) -> bool:
    module = importlib.import_module("build_kernels.kernels.topk_indices.contract")
    contract = module.contract(constants)
    resident = int(constants["BLOCKS_PER_SM"])
    own = 13 * 1024 if constants["HELD"] else 8192
    # 228 KB, of which each CTA takes 1 KB; and the kernel's own variables.
    memory = resident * (contract.dynamic_shared_memory + 1024 + own)
    return memory <= 228 * 1024 and resident * contract.block[0] <= 2048


def test_topk_indices_fits_the_multiprocessor() -> None:
    for job in plan(targets=TARGETS, kernels=["topk_indices"]):
        assert fits_the_multiprocessor(job.constants), job.key


def test_the_candidates_of_a_trial_are_other_variants_that_fit() -> None:
    (kernel,) = (kernel for kernel in KERNELS_OF_CATALOG if kernel.name == "topk_indices")
    known = [variant.constants_of(None) for variant in kernel.variants]
    found = candidates(kernel)
    assert [variant.name for variant in found] == list(CANDIDATES)
    for variant in found:
        constants = variant.constants_of(None)
        assert constants not in known
        assert fits_the_multiprocessor(constants), variant.name
        known.append(constants)
