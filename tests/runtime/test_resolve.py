"""The resolver: every decision is a function of its arguments, and says why."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from router_runtime.errors import ResolutionError
from router_runtime.resolve import MINIMUM_DRIVER, DeviceFacts, Request, resolve

H100 = DeviceFacts(9, 0, MINIMUM_DRIVER, 132, 227 * 1024)
B200 = dataclasses.replace(H100, major=10)
SHAPE = {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}


def dense(build: SimpleNamespace, **fields: Any) -> Any:
    contract = fields.pop("contract", build.dense(128, 24))
    fields = {"model": "small", "constants": SHAPE} | fields
    return build.entry("dense_router_decode", contract, **fields)


def decide(
    build: SimpleNamespace, entries: list[Any], standing: Any, device: Any = H100, **request: Any
) -> Any:
    asked = Request(**({"kernel": "dense_router_decode", "constants": SHAPE} | request))
    status = standing if callable(standing) else lambda entry: standing
    return resolve(asked, device, build.manifest(entries), status)


def test_verified_entry_is_chosen(build: SimpleNamespace) -> None:
    entry = dense(build)
    assert decide(build, [entry], "verified").choice is entry


def test_verified_is_preferred_to_source_verified(build: SimpleNamespace) -> None:
    native, portable = dense(build, variant="tcgen05"), dense(build)
    standing = {"tcgen05": "source-verified", "portable": "verified"}
    found = decide(build, [native, portable], lambda entry: standing[entry.variant])
    assert found.choice is portable
    assert "another fits better" in found.trace()


def test_specialised_variant_is_preferred_at_equal_standing(build: SimpleNamespace) -> None:
    native, portable = dense(build, variant="tcgen05"), dense(build)
    assert decide(build, [portable, native], "verified").choice is native


def test_exact_target_is_preferred_to_family(build: SimpleNamespace) -> None:
    family, exact = dense(build, target="sm_100f"), dense(build, target="sm_100a")
    assert decide(build, [family, exact], "verified", B200).choice is exact


def test_unproven_is_never_chosen_unless_named(build: SimpleNamespace) -> None:
    entry = dense(build)
    found = decide(build, [entry], "unproven")
    assert found.choice is None
    with pytest.raises(ResolutionError, match=r"unproven.*\n.*verify --record"):
        found.require()
    assert decide(build, [entry], "unproven", variant="portable").choice is entry


def test_blackwell_today_takes_the_source_verified_portable_variant(build: SimpleNamespace) -> None:
    portable = dense(build, target="sm_100a")
    native = dense(build, target="sm_100a", variant="tcgen05")
    hopper = dense(build)
    standing = {portable.key: "source-verified", native.key: "unproven", hopper.key: "verified"}
    found = decide(build, [portable, native, hopper], lambda entry: standing[entry.key], B200)
    assert found.choice is portable
    forced = decide(
        build, [portable, native, hopper], lambda e: standing[e.key], B200, variant="tcgen05"
    )
    assert forced.choice is native


def test_tightest_capacity_wins(build: SimpleNamespace) -> None:
    entries = [
        build.entry("activation_topk", build.activation(capacity), variant=f"e{capacity}")
        for capacity in (1024, 256, 384)
    ]
    for experts, expected in ((24, "e256"), (256, "e256"), (257, "e384"), (1000, "e1024")):
        request = Request("activation_topk", quantities={"experts": experts, "top_k": 6})
        found = resolve(request, H100, build.manifest(entries), lambda entry: "verified")
        assert found.require().variant == expected


def test_failure_lists_every_candidate_with_every_reason(build: SimpleNamespace) -> None:
    contract = dataclasses.replace(build.dense(128, 24), dynamic_shared_memory=300 * 1024)
    entries = [
        dense(build, target="sm_100a"),
        dense(build, constants=SHAPE | {"HIDDEN": 7168}, model="pro"),
        dense(build, contract=contract, variant="large"),
    ]
    old = dataclasses.replace(H100, driver=12080)
    found = decide(build, entries, "unproven", old, quantities={"tokens": 9})
    with pytest.raises(ResolutionError) as caught:
        found.require()
    text = str(caught.value)
    for entry in entries:
        assert entry.key in text
    for reason in (
        "built for sm_100a, the device has compute capability 9.0",
        "HIDDEN is 7168, not 128",
        "needs 307200 bytes of shared memory a block, the device has 232448",
        "needs a driver for CUDA 13.0, found CUDA 12.8",
        "serves tokens from 1 to 8, not 9",
        "unproven: no evidence",
        "release 580",
    ):
        assert reason in text


def test_unsupported_compute_capability_names_the_build_command(build: SimpleNamespace) -> None:
    ampere = dataclasses.replace(H100, major=8)
    with pytest.raises(ResolutionError, match=r"build-kernels build --target sm_80a.*device='cpu'"):
        decide(build, [dense(build)], "verified", ampere).require()


def test_unknown_model_names_the_catalog(build: SimpleNamespace) -> None:
    found = decide(build, [dense(build)], "verified", constants=SHAPE | {"EXPERTS": 144})
    with pytest.raises(ResolutionError, match=r"EXPERTS is 24, not 144[\s\S]*--model-file"):
        found.require()


def test_unknown_variant_lists_those_there_are(build: SimpleNamespace) -> None:
    with pytest.raises(ResolutionError, match=r"ask for one of the variants \['portable'\]"):
        decide(build, [dense(build)], "verified", variant="fast").require()


def test_missing_kernel(build: SimpleNamespace) -> None:
    with pytest.raises(ResolutionError, match="no entry of this kernel .*make build-cubins"):
        decide(build, [], "verified").require()


def test_numerics_tag_must_agree(build: SimpleNamespace) -> None:
    entry = dense(build, numerics="bf16-k16-f32/chunk512/epilogue1")
    assert decide(build, [entry], "verified", numerics=entry.numerics).choice is entry
    found = decide(build, [entry], "verified", numerics="bf16-k16-f32/chunk256/epilogue1")
    assert "its numerics are bf16-k16-f32/chunk512/epilogue1" in found.trace()
    assert found.choice is None


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        *[("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_100a", (10, 0), True)],
        *[("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True), ("sm_100f", (12, 0), False)],
    ],
)
def test_targets(
    build: SimpleNamespace, target: str, capability: tuple[int, int], runs: bool
) -> None:
    device = dataclasses.replace(H100, major=capability[0], minor=capability[1])
    found = decide(build, [dense(build, target=target)], "verified", device)
    assert (found.choice is not None) == runs
