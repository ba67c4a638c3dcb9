"""The launcher: what reaches the driver, read back from memory as the device would read it."""

from __future__ import annotations

import dataclasses
import struct
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from router_runtime.device import launch, tensor_map
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.tensor_map import Matrix
from router_runtime.errors import DriverError, InputError
from router_runtime.format.contract import GridAxis, TensorMap

ONE = GridAxis("constant")
CLUSTER = int(real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
SERIAL = int(real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)


@pytest.fixture
def load(build: SimpleNamespace, fake: Any) -> Any:
    """A loaded kernel of that contract under a symbol that the fake driver does not execute."""

    def loading(contract: Any, sms: int = 132) -> LoadedKernel:
        entry = dataclasses.replace(build.entry("anything", contract), symbol="anything")
        return LoadedKernel(entry, SimpleNamespace(entry=entry), 0, sms)

    return loading


def contract_of(build: SimpleNamespace, text: str, **fields: Any) -> Any:
    base = build.select(1024)
    fields = {"grid": (ONE, ONE, ONE), "limits": {}} | fields
    return dataclasses.replace(base, parameters=build.parameters(text), **fields)


def test_every_type_at_its_place(build: SimpleNamespace, load: Any, fake: Any) -> None:
    text = "a=i32 b=ptr:bf16 c=f32 d=i64 e=i32 f=ptr:i64 g=f32"
    kernel = load(contract_of(build, text))
    values = {"a": -5, "b": 2**63 + 8, "c": 1.5, "d": -(2**40), "e": 2**31 - 1, "f": 0, "g": -0.0}
    kernel.launch(0x1234, **values)
    (seen,) = fake.launches
    assert seen.arguments == values
    assert seen.raw["g"] == struct.pack("f", -0.0)
    assert seen.stream == 0x1234
    assert seen.block == (128, 1, 1)


def test_launching_by_name_again_uses_the_same_memory(
    build: SimpleNamespace, load: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    block = launch.LaunchBlock
    monkeypatch.setattr(launch, "LaunchBlock", lambda *given: made.append(given) or block(*given))
    kernel = load(contract_of(build, "a=i32 b=ptr:f32 c=f32"))
    given: list[dict[str, Any]] = [
        {"a": 1, "b": 64, "c": 0.5},
        {"c": 2.0, "a": 3, "b": None},
        {"b": 128, "c": -0.5, "a": 4},
    ]
    for arguments in given:
        kernel.launch(0, **arguments)
    assert [seen.arguments for seen in fake.launches] == [
        {name: value or 0 for name, value in arguments.items()} for arguments in given
    ]
    assert len(made) == 1


def test_binding_keeps_the_order_of_names_apart_from_the_order_of_arguments(
    build: SimpleNamespace, load: Any, fake: Any
) -> None:
    kernel = load(contract_of(build, "a=i32 b=i32 c=i32 d=i32"))
    bound = kernel.bind(("d", "a"), c=3, b=2)
    bound(1, 40, 10)
    bound(2, 41, 11)
    assert [launch.arguments for launch in fake.launches] == [
        {"a": 10, "b": 2, "c": 3, "d": 40},
        {"a": 11, "b": 2, "c": 3, "d": 41},
    ]
    assert [launch.stream for launch in fake.launches] == [1, 2]


def test_launchers_of_one_kernel_keep_their_own_arguments(
    build: SimpleNamespace, load: Any, fake: Any
) -> None:
    kernel = load(contract_of(build, "a=i32 b=ptr:f32 c=f32"))
    first, second = kernel.bind(("a",), b=64, c=0.5), kernel.bind(("c", "a"), b=128)
    first(0, 1)
    second(0, 2.0, 3)
    first(0, 4)
    assert [launch.arguments for launch in fake.launches] == [
        {"a": 1, "b": 64, "c": 0.5},
        {"a": 3, "b": 128, "c": 2.0},
        {"a": 4, "b": 64, "c": 0.5},
    ]


def test_one_parameter(build: SimpleNamespace, load: Any, fake: Any) -> None:
    load(contract_of(build, "a=i32")).launch(0, a=7)
    assert fake.launches[0].arguments == {"a": 7}


@pytest.mark.parametrize(
    "given", [{"a": 1}, {"a": 1, "b": 2, "z": 3}, {}], ids=["missing", "unknown", "none"]
)
def test_names_must_match(build: SimpleNamespace, load: Any, given: dict[str, int]) -> None:
    kernel = load(contract_of(build, "a=i32 b=i32"))
    with pytest.raises(InputError, match=r"expected \['a', 'b'\], found"):
        kernel.launch(0, **given)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 1.5, "x", None])
def test_values_that_do_not_fit(
    build: SimpleNamespace, load: Any, fake: Any, value: object
) -> None:
    kernel = load(contract_of(build, "a=i32 b=i32"))
    with pytest.raises(InputError, match=r"expected \{'a': 'i32', 'b': 'i32'\}, found"):
        kernel.launch(0, a=value, b=0)
    assert not fake.launches


def test_tensors_are_checked_and_null_is_none(build: SimpleNamespace, load: Any, fake: Any) -> None:
    kernel = load(contract_of(build, "a=ptr:bf16 b=ptr:i32"))
    with pytest.raises(InputError, match=r"expected \('bfloat16', 'cuda', 0\), found"):
        kernel.launch(0, a=torch.zeros(4), b=None)
    kernel.launch(0, a=16, b=None)
    assert fake.launches[0].arguments == {"a": 16, "b": 0}


@pytest.mark.parametrize(
    ("axis", "cluster", "sms", "tokens", "expected"),
    [
        (GridAxis("constant", 6), 1, 132, 5, 6),
        (GridAxis("ceil", argument="tokens", divisor=4), 1, 132, 1, 1),
        (GridAxis("ceil", argument="tokens", divisor=4), 1, 132, 9, 3),
        (GridAxis("ceil", 8, "tokens", 16), 8, 132, 17, 16),
        (GridAxis("ceil_capped_at_sms", argument="tokens"), 1, 132, 131, 131),
        (GridAxis("ceil_capped_at_sms", argument="tokens"), 1, 132, 10**6, 132),
        (GridAxis("ceil_capped_at_sms", 8, "tokens", 2), 8, 132, 10**6, 128),
        (GridAxis("ceil_capped_at_sms", 8, "tokens", 2), 8, 132, 3, 16),
        (GridAxis("ceil_capped_at_sms", 16, "tokens"), 16, 7, 5, 16),
    ],
)
def test_grid(
    build: SimpleNamespace,
    load: Any,
    fake: Any,
    axis: GridAxis,
    cluster: int,
    sms: int,
    tokens: int,
    expected: int,
) -> None:
    contract = contract_of(build, "tokens=i32", grid=(ONE, axis, ONE), cluster=(1, cluster, 1))
    load(contract, sms).launch(0, tokens=tokens)
    assert fake.launches[0].grid == (1, expected, 1)
    assert fake.launches[0].attributes == ({CLUSTER: (1, cluster, 1)} if cluster > 1 else {})


def test_grid_argument_that_is_no_parameter(build: SimpleNamespace, load: Any, fake: Any) -> None:
    grid = (GridAxis("ceil", argument="rows", divisor=2), ONE, ONE)
    load(contract_of(build, "a=i32", grid=grid)).launch(0, a=1, rows=5)
    assert fake.launches[0].grid == (3, 1, 1)


def test_dependent_launch_and_shared_memory(build: SimpleNamespace, load: Any, fake: Any) -> None:
    contract = contract_of(
        build, "a=i32", programmatic_dependent_launch=True, dynamic_shared_memory=70000
    )
    load(contract).launch(0, a=1)
    assert fake.launches[0].attributes == {SERIAL: 1}
    assert fake.launches[0].shared == 70000


def test_failed_launch_names_its_arguments(build: SimpleNamespace, load: Any, fake: Any) -> None:
    fake.launch_status = real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_VALUE \(1\) with \{'a': 9\}"):
        load(contract_of(build, "a=i32")).launch(0, a=9)


def test_threads_do_not_share_a_block(build: SimpleNamespace, load: Any, fake: Any) -> None:
    """Two threads inside the driver at once, as the real call allows: each sees its own values."""
    kernel = load(
        contract_of(build, "a=i64 tokens=i32", grid=(GridAxis("ceil", argument="tokens"), ONE, ONE))
    )
    bound = kernel.bind(("a", "tokens"))
    count, rounds = 4, 200
    barrier = threading.Barrier(count)
    fake.during_launch = lambda: barrier.wait(timeout=30) and None
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(rounds):
                bound(100 + number, number * 1000 + turn, number + 1)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(fake.launches) == count * rounds
    for seen in fake.launches:
        number = seen.stream - 100
        assert seen.arguments["a"] // 1000 == number
        assert seen.grid == (number + 1, 1, 1)


def test_thread_without_context_gets_one(build: SimpleNamespace, load: Any, fake: Any) -> None:
    kernel = load(contract_of(build, "a=i32"))
    kernel.launch(0, a=1)
    kernel.launch(0, a=2)
    assert fake.calls == ["set 1000"]
    fake.current_context = 1000
    thread = threading.Thread(target=lambda: kernel.launch(0, a=3))
    thread.start()
    thread.join()
    assert fake.calls == ["set 1000"]
    assert len(fake.launches) == 3


# --- tensor maps ---

RECIPES = (
    TensorMap("map", "x", "bf16", (64, 128), "128B"),
    TensorMap("other", "y", "f32", (32, 8), "none"),
)


@pytest.fixture
def mapped(build: SimpleNamespace, load: Any) -> Any:
    text = "map=tensormap n=i32 other=tensormap p=ptr:f32"
    return load(contract_of(build, text, tensor_maps=RECIPES))


def test_tensor_map_is_encoded_as_the_recipe_says(mapped: Any, fake: Any) -> None:
    x, y = Matrix(0x1000, 50, 4096, 4160), Matrix(0x2000, 16, 384, 384)
    mapped.launch(0, n=50, p=0x40, x=x, y=y)
    types, swizzles = real.CUtensorMapDataType, real.CUtensorMapSwizzle
    first, second = fake.encoded
    assert first.pop("map") % 64 == 0
    assert second.pop("map") % 64 == 0
    common = {
        "rank": 2,
        "steps": (1, 1),
        "interleave": int(real.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        "l2": int(real.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        "fill": int(real.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    }
    assert first == common | {
        "type": int(types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        "address": 0x1000,
        "extents": (4096, 50),
        "strides": (4160 * 2,),
        "box": (64, 128),
        "swizzle": int(swizzles.CU_TENSOR_MAP_SWIZZLE_128B),
    }
    assert second == common | {
        "type": int(types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32),
        "address": 0x2000,
        "extents": (384, 16),
        "strides": (384 * 4,),
        "box": (32, 8),
        "swizzle": int(swizzles.CU_TENSOR_MAP_SWIZZLE_NONE),
    }
    (seen,) = fake.launches
    assert seen.raw["map"] == struct.pack("<4Q", 0x1000, 4096, 50, 4160 * 2).ljust(128, b"\xa5")
    assert seen.raw["other"] == struct.pack("<4Q", 0x2000, 384, 16, 384 * 4).ljust(128, b"\xa5")
    assert seen.arguments == {"n": 50, "p": 0x40}


def test_tensor_map_is_encoded_again_only_for_another_matrix(mapped: Any, fake: Any) -> None:
    y = Matrix(0x2000, 16, 384, 384)
    bound = mapped.bind(("x", "n"), y=y, p=0)
    for x in (Matrix(0x1000, 5, 64, 64), Matrix(0x1000, 5, 64, 64), Matrix(0x1000, 6, 64, 64)):
        bound(0, x, 5)
    assert [call["extents"] for call in fake.encoded] == [(64, 5), (384, 16), (64, 6)]


def test_a_matrix_that_cannot_be_mapped(mapped: Any, fake: Any) -> None:
    """The error names it, nothing is launched, and nothing of it is cached."""
    x, y = Matrix(0x1008, 5, 64, 64), Matrix(0x2000, 16, 384, 384)
    fake.encode_status = 1
    for _ in range(2):
        with pytest.raises(DriverError, match=r"tensor map of map: .*multiples of 16.*CUresult 1"):
            mapped.launch(0, n=50, p=0, x=x, y=y)
    assert not fake.launches
    fake.encode_status = 0
    mapped.launch(0, n=50, p=0, x=x, y=y)
    assert [call["address"] for call in fake.encoded] == [0x1008, 0x1008, 0x1008, 0x2000]


def test_swizzle_numbers_are_the_drivers() -> None:
    for name, value in tensor_map.SWIZZLES.items():
        suffix = name.upper()
        assert int(getattr(real.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{suffix}")) == value
