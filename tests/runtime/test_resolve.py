"""The resolver: every decision is a function of its arguments, and says why."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from router_runtime.device.dispatch import dispatch
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.device.resolve import NOT_READ, Request, resolve, status_if_fitting
from router_runtime.errors import ResolutionError

H100 = DeviceFacts(9, 0, MINIMUM_DRIVER, 132, 227 * 1024)
B200 = dataclasses.replace(H100, major=10)
SHAPE = {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}
PHASES = ("decode", "prefill")


def dense(build: SimpleNamespace, **fields: Any) -> Any:
    contract = fields.pop("contract", build.dense(128, 24))
    fields = {"model": "small", "constants": SHAPE} | fields
    return build.entry("dense_router_decode", contract, **fields)


def decide(
    build: SimpleNamespace, entries: list[Any], statuses: Any, device: Any = H100, **request: Any
) -> Any:
    requested = Request(**({"kernel": "dense_router_decode", "constants": SHAPE} | request))
    status = statuses if callable(statuses) else lambda entry: statuses
    return resolve(requested, device, build.manifest(entries), status)


def test_verified_entry_is_chosen(build: SimpleNamespace) -> None:
    entry = dense(build)
    assert decide(build, [entry], "verified").choice is entry


def test_verified_is_preferred_to_source_verified(build: SimpleNamespace) -> None:
    native, portable = dense(build, variant="tcgen05"), dense(build)
    statuses = {"tcgen05": "source-verified", "portable": "verified"}
    found = decide(build, [native, portable], lambda entry: statuses[entry.variant])
    assert found.choice is portable
    assert "another fits better" in found.trace()


def test_specialised_variant_is_preferred_at_equal_status(build: SimpleNamespace) -> None:
    native, portable = dense(build, variant="tcgen05"), dense(build)
    assert decide(build, [portable, native], "verified").choice is native


def test_exact_target_is_preferred_to_family(build: SimpleNamespace) -> None:
    family, exact = dense(build, target="sm_100f"), dense(build, target="sm_100a")
    assert decide(build, [family, exact], "verified", B200).choice is exact


@pytest.mark.parametrize(
    ("statuses", "capability", "target"),
    [
        # Where both load, better evidence decides, then the more specific target.
        ({"sm_100f": "verified", "sm_100a": "verified"}, (10, 0), "sm_100a"),
        ({"sm_100f": "source-verified", "sm_100a": "source-verified"}, (10, 0), "sm_100a"),
        ({"sm_100f": "verified", "sm_100a": "source-verified"}, (10, 0), "sm_100f"),
        ({"sm_100f": "source-verified", "sm_100a": "verified"}, (10, 0), "sm_100a"),
        ({"sm_100f": "source-verified", "sm_100a": "unproven"}, (10, 0), "sm_100f"),
        # The others of the family load one of them.
        ({"sm_100f": "source-verified", "sm_100a": "verified"}, (10, 3), "sm_100f"),
        ({"sm_100f": "source-verified", "sm_100a": "verified"}, (10, 7), "sm_100f"),
    ],
)
def test_of_a_family_set_and_an_exact_set_one_serves_every_batch(
    build: SimpleNamespace, statuses: dict[str, str], capability: tuple[int, int], target: str
) -> None:
    entries = [
        phase(build, name, high, target=each)
        for each in statuses
        for name, high in (("decode", 64), ("prefill", 4096))
    ]
    device = dataclasses.replace(H100, major=capability[0], minor=capability[1])
    ranges = divide(build, entries, lambda entry: statuses[entry.target], device).require()
    assert [each.entry.target for each in ranges] == [target, target]


def test_unproven_is_never_chosen_unless_named(build: SimpleNamespace) -> None:
    entry = dense(build)
    found = decide(build, [entry], "unproven")
    assert found.choice is None
    with pytest.raises(ResolutionError, match=r"unproven.*\n.*verify --record"):
        found.require()
    assert decide(build, [entry], "unproven", variant="portable").choice is entry


def test_blackwell_takes_the_source_verified_variant_before_an_unproven_one(
    build: SimpleNamespace,
) -> None:
    portable = dense(build, target="sm_100a")
    native = dense(build, target="sm_100a", variant="tcgen05")
    hopper = dense(build)
    statuses = {portable.key: "source-verified", native.key: "unproven", hopper.key: "verified"}
    found = decide(build, [portable, native, hopper], lambda entry: statuses[entry.key], B200)
    assert found.choice is portable
    forced = decide(
        build, [portable, native, hopper], lambda e: statuses[e.key], B200, variant="tcgen05"
    )
    assert forced.choice is native


def test_emulated_serves_only_if_accepted_or_named(build: SimpleNamespace) -> None:
    native = dense(build, target="sm_100a", variant="tcgen05")
    found = decide(build, [native], "emulated", B200)
    assert found.choice is None
    with pytest.raises(ResolutionError) as caught:
        found.require()
    text = str(caught.value)
    assert "[emulated]: emulated: its PTX passed with some instructions in software" in text
    # The three ways out: record evidence, accept what is emulated, or name the variant.
    assert "run on this GPU: " in text
    assert "verify --record" in text
    assert "or accept what is emulated: Router(..., accept='emulated')" in text
    assert "Router(..., variants={'dense_router_decode': 'tcgen05'})" in text
    assert decide(build, [native], "emulated", B200, accept="emulated").choice is native
    assert decide(build, [native], "emulated", B200, variant="tcgen05").choice is native
    assert decide(build, [native], "unproven", B200, accept="emulated").choice is None
    assert "accept=emulated" in str(decide(build, [native], "emulated", accept="emulated").request)


def test_accepting_is_advised_only_where_it_helps(build: SimpleNamespace) -> None:
    """Not for an unproven entry, nor for a row op, which no Router chooses."""
    with pytest.raises(ResolutionError) as caught:
        decide(build, [dense(build)], "unproven").require()
    assert "accept" not in str(caught.value)
    row_op = build.entry("topk_select", build.select(1024))
    found = resolve(Request("topk_select"), H100, build.manifest([row_op]), lambda e: "emulated")
    with pytest.raises(ResolutionError) as caught:
        found.require()
    assert "accept" not in str(caught.value)


def test_of_accepted_and_better_evidence_the_verified_comes_first(build: SimpleNamespace) -> None:
    native = dense(build, target="sm_100a", variant="tcgen05")
    portable = dense(build, target="sm_100a")
    for status, expected in (("verified", portable), ("source-verified", native)):
        statuses = {native.key: "emulated", portable.key: status}
        found = decide(
            build,
            [portable, native],
            lambda e, statuses=statuses: statuses[e.key],
            B200,
            accept="emulated",
        )
        assert found.choice is expected  # of equals, the specialised variant


def test_evidence_is_read_only_where_it_decides(build: SimpleNamespace) -> None:
    entries = [
        *(dense(build), dense(build, variant="second"), dense(build, target="sm_100a")),
        dense(build, constants=SHAPE | {"HIDDEN": 7168}, model="pro"),
    ]
    read: list[str] = []

    def status(entry: Any) -> str:
        read.append(entry.variant)
        return "verified"

    request = Request("dense_router_decode", SHAPE)
    found = resolve(
        request, H100, build.manifest(entries), status_if_fitting([request], H100, status)
    )
    assert found.choice in entries[:2]
    assert sorted(read) == ["portable", "second"]
    assert found.trace().count("[not read]: ") == 2
    assert "no evidence" not in found.trace()


def test_what_was_not_read_is_not_proven(build: SimpleNamespace) -> None:
    """An entry with the status NOT_READ does not serve, even if it could."""
    found = decide(build, [dense(build)], NOT_READ)
    assert found.choice is None
    assert "no evidence that this digest" in found.trace()


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
        "needs 307200 bytes of shared memory per block, the device has 232448",
        "needs a driver for CUDA 13.0, found CUDA 12.8",
        "serves tokens from 1 to 8, not 9",
        "unproven: no evidence",
        "release 580",
    ):
        assert reason in text


def test_unsupported_compute_capability_names_no_build_command(build: SimpleNamespace) -> None:
    ampere = dataclasses.replace(H100, major=8)
    with pytest.raises(ResolutionError, match=r"capability 8\.0 .*device='cpu'") as caught:
        decide(build, [dense(build)], "verified", ampere).require()
    assert "--target" not in str(caught.value)


def test_supported_compute_capability_names_the_build_command(build: SimpleNamespace) -> None:
    other = dataclasses.replace(H100, major=10, minor=3)
    with pytest.raises(ResolutionError, match=r"build --target sm_100f .*device='cpu'"):
        decide(build, [dense(build)], "verified", other).require()


def test_unknown_model_names_the_catalog(build: SimpleNamespace) -> None:
    found = decide(build, [dense(build)], "verified", constants=SHAPE | {"EXPERTS": 144})
    with pytest.raises(ResolutionError, match=r"EXPERTS is 24, not 144[\s\S]*--model-file"):
        found.require()


def test_unknown_variant_lists_those_there_are(build: SimpleNamespace) -> None:
    with pytest.raises(ResolutionError, match=r"request one of the variants \['portable'\]"):
        decide(build, [dense(build)], "verified", variant="fast").require()


def test_missing_kernel(build: SimpleNamespace) -> None:
    with pytest.raises(ResolutionError, match=r"no entry of this kernel .*make build-cubins"):
        decide(build, [], "verified").require()


# --- which of several kernels serves how many tokens ---

TAG = "bf16-k16-f32/chunk512/epilogue1"
REQUESTS = [Request(f"dense_router_{phase}", constants=SHAPE, quantities={}) for phase in PHASES]
FIGURES = {
    # The decode kernel is faster up to 64 tokens, and from 1024 on slower by far.
    "decode": ((1, 4.0), (64, 8.0), (1024, 90.0)),
    "prefill": ((1, 12.0), (64, 12.0), (1024, 20.0)),
}


def phase(build: SimpleNamespace, name: str, high: int = 2**20, **fields: Any) -> Any:
    contract = getattr(build, "dense" if name == "decode" else "prefill")
    fields = {"latency": FIGURES[name], "numerics": TAG} | fields
    limits = (fields.pop("low", 1), high)
    return build.entry(
        f"dense_router_{name}",
        contract(128, 24, tokens=limits),
        **({"model": "small", "constants": SHAPE} | fields),
    )


def divide(
    build: SimpleNamespace, entries: list[Any], statuses: Any = "verified", device: Any = H100
) -> Any:
    status = statuses if callable(statuses) else lambda entry: statuses
    return dispatch(REQUESTS, device, build.manifest(entries), status)


def token_ranges_of(found: Any) -> list[tuple[int, int, str, str]]:
    return [
        (each.low, each.high, each.entry.kernel.rpartition("_")[2], each.entry.variant)
        for each in found.require()
    ]


def test_the_measured_latency_decides(build: SimpleNamespace) -> None:
    decode, prefill = phase(build, "decode"), phase(build, "prefill", 2**22)
    found = token_ranges_of(divide(build, [prefill, decode]))
    assert found == [(1, 64, "decode", "portable"), (65, 2**22, "prefill", "portable")]
    slow = dataclasses.replace(decode, latency=((1, 4.0), (64, 12.5), (1024, 90.0)))
    assert token_ranges_of(divide(build, [prefill, slow]))[0] == (1, 1, "decode", "portable")
    # Beyond the last figure a token costs what it costs there: 12 / 64 us, more than 90 / 1024.
    short = dataclasses.replace(prefill, latency=FIGURES["prefill"][:2])
    found = token_ranges_of(divide(build, [decode, short]))
    assert found == [(1, 2**20, "decode", "portable"), (2**20 + 1, 2**22, "prefill", "portable")]


def test_several_variants_within_their_limits(build: SimpleNamespace) -> None:
    few = phase(build, "decode", 16, variant="few", latency=((1, 3.0), (64, 9.0)))
    decode = phase(build, "decode", 64)
    wide = phase(build, "prefill", low=33, variant="wide", latency=((1, 9.0), (1024, 15.0)))
    found = token_ranges_of(divide(build, [wide, decode, few]))
    assert found == [
        (1, 1, "decode", "few"),
        (2, 64, "decode", "portable"),
        (65, 2**20, "prefill", "wide"),
    ]


def test_without_figures_the_closest_fit_serves(build: SimpleNamespace) -> None:
    decode, prefill = (
        phase(build, name, high, latency=()) for name, high in (("decode", 64), ("prefill", 4096))
    )
    found = token_ranges_of(divide(build, [decode, prefill]))
    assert found == [(1, 64, "decode", "portable"), (65, 4096, "prefill", "portable")]
    measured = dataclasses.replace(prefill, latency=FIGURES["prefill"])
    assert token_ranges_of(divide(build, [decode, measured])) == [(1, 4096, "prefill", "portable")]


def test_status_comes_before_speed(build: SimpleNamespace) -> None:
    """An unproven entry does not serve beside a source-verified one, even if the manifest's figures
    say that it is faster.
    """
    decode = phase(build, "decode", target="sm_100a")
    prefill = phase(build, "prefill", target="sm_100a", variant="tcgen05")
    hopper = phase(build, "prefill", variant="wgmma")
    statuses = {decode.key: "source-verified", prefill.key: "unproven", hopper.key: "verified"}
    entries = [decode, prefill, hopper]
    found = divide(build, entries, lambda entry: statuses[entry.key], B200)
    assert token_ranges_of(found) == [(1, 2**20, "decode", "portable")]
    # A named variant needs no evidence: then the figures decide.
    requests = [REQUESTS[0], dataclasses.replace(REQUESTS[1], variant="tcgen05")]
    statuses[decode.key] = "verified"
    named = dispatch(requests, B200, build.manifest(entries), lambda e: statuses[e.key])
    assert [each[2:] for each in token_ranges_of(named)] == [
        ("decode", "portable"),
        ("prefill", "tcgen05"),
    ]


@pytest.mark.parametrize("tag", ["bf16-k16-f32/chunk256/epilogue1", None])
def test_numerics_must_agree(build: SimpleNamespace, tag: str | None) -> None:
    """A prefill kernel of other bits is refused, with the reason, and the decode kernel serves."""
    decode, prefill = phase(build, "decode"), phase(build, "prefill", low=2, numerics=tag)
    found = divide(build, [decode, prefill])
    assert token_ranges_of(found) == [(1, 2**20, "decode", "portable")]
    assert (
        f"its numerics are {tag}, those of {decode.key} are {TAG}" in found.resolutions[1].trace()
    )
    requests = [REQUESTS[0], dataclasses.replace(REQUESTS[1], variant="portable")]
    named = dispatch(requests, H100, build.manifest([decode, prefill]), lambda entry: "verified")
    with pytest.raises(ResolutionError, match=f"its numerics are {tag}, those of"):
        named.require()


def test_of_two_tags_the_faster_set_serves(build: SimpleNamespace) -> None:
    """Blackwell, all verified there: the portable decode kernel is the fastest for one token, but
    only the tcgen05 pair has a kernel for many."""
    portable = phase(build, "decode", 64, target="sm_100a")
    own = {"target": "sm_100a", "variant": "tcgen05", "numerics": "bf16-tcgen05-k16-f32/x"}
    decode = phase(build, "decode", 64, latency=((1, 5.0), (64, 7.0)), **own)
    prefill = phase(build, "prefill", 2**22, **own)
    entries = [portable, decode, prefill]
    found = divide(build, entries, device=B200)
    assert token_ranges_of(found) == [
        (1, 64, "decode", "tcgen05"),
        (65, 2**22, "prefill", "tcgen05"),
    ]
    assert f"its numerics are {TAG}, those of {decode.key} are" in found.resolutions[0].trace()
    # Slow ones do not replace a set that is faster on the whole.
    slow = [dataclasses.replace(e, latency=((1, 50.0), (1024, 900.0))) for e in (decode, prefill)]
    found = divide(build, [portable, *slow], device=B200)
    assert [each[2:] for each in token_ranges_of(found)] == [("decode", "portable")]
    # And the proven ones come first, however slow.
    found = divide(
        build,
        entries,
        lambda e: "source-verified" if e is portable else "unproven",
        B200,
    )
    assert [each[2:] for each in token_ranges_of(found)] == [("decode", "portable")]


def test_the_faster_set_serves_if_emulated_is_accepted(build: SimpleNamespace) -> None:
    """Blackwell before any record from there: portable kernels are source-verified for every batch,
    the tcgen05 pair was emulated. By default the portable ones serve, else the faster pair does.
    """
    few = phase(build, "decode", 64, target="sm_100a")
    many = phase(build, "prefill", 2**22, target="sm_100a", latency=((1, 20.0), (1024, 60.0)))
    own = {"target": "sm_100a", "variant": "tcgen05", "numerics": "bf16-tcgen05-k16-f32/x"}
    decode = phase(build, "decode", 64, latency=((1, 3.0), (64, 5.0)), **own)
    prefill = phase(build, "prefill", 2**22, **own)
    entries = [few, many, decode, prefill]

    def served(accept: str | None, native: str = "emulated") -> list[tuple[str, str]]:
        requests = [dataclasses.replace(each, accept=accept) for each in REQUESTS]
        found = dispatch(
            requests,
            B200,
            build.manifest(entries),
            lambda e: native if e in (decode, prefill) else "source-verified",
        )
        return [each[2:] for each in token_ranges_of(found)]

    assert served(None) == [("decode", "portable"), ("prefill", "portable")]
    assert served("emulated") == [("decode", "tcgen05"), ("prefill", "tcgen05")]
    assert served("emulated", "unproven") == served(None)


def test_a_dispatch_of_emulated_entries_names_both_roads(build: SimpleNamespace) -> None:
    entries = [phase(build, name, target="sm_100a") for name in PHASES]
    found = divide(build, entries, "emulated", B200)
    with pytest.raises(ResolutionError, match=r"verify --record.*Router\(..., accept='emulated'\)"):
        found.require()
    assert "accept='emulated'" in found.next_step(brief=True)


def test_entries_without_a_tag_do_not_mix(build: SimpleNamespace) -> None:
    decode, prefill = (phase(build, name, numerics=None) for name in PHASES)
    assert token_ranges_of(divide(build, [decode, prefill])) == [(1, 2**20, "decode", "portable")]


def test_a_gap_is_refused(build: SimpleNamespace) -> None:
    decode, prefill = phase(build, "decode", 64), phase(build, "prefill", low=128)
    with pytest.raises(ResolutionError, match=r"from 1 token up, found a gap[\s\S]*prefill"):
        divide(build, [decode, prefill]).require()
    with pytest.raises(ResolutionError, match="verify --record"):
        divide(build, [decode, prefill], "unproven").require()


def test_a_missing_parameter_is_a_reason(build: SimpleNamespace) -> None:
    entry = dense(build, contract=build.dense(128, 24, logits=False))
    found = decide(build, [entry], "verified", parameters=("logits_out",))
    with pytest.raises(
        ResolutionError, match=r"has no parameter logits_out\nfor kernels with .* make build-cubins"
    ):
        found.require()
    assert decide(build, [dense(build)], "verified", parameters=("logits_out",)).choice


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        *[("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_100a", (10, 0), True)],
        *[("sm_100a", (10, 3), False), ("sm_103a", (10, 7), False), ("sm_107a", (10, 7), True)],
        *[("sm_100f", (10, minor), minor in (0, 3, 7)) for minor in range(10)],
        *[("sm_100f", (11, 0), False), ("sm_100f", (12, 0), False)],
    ],
)
def test_targets(
    build: SimpleNamespace, target: str, capability: tuple[int, int], runs: bool
) -> None:
    device = dataclasses.replace(H100, major=capability[0], minor=capability[1])
    found = decide(build, [dense(build, target=target)], "verified", device)
    assert (found.choice is not None) == runs
