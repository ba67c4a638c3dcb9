"""The manifest and its codec: what is written is read back, and nothing else is read."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_runtime.errors import FormatError, RouterRuntimeError
from router_runtime.format.codec import decode, encode, parse_json
from router_runtime.format.contract import (
    PARAMETER_TYPES,
    Contract,
    GridAxis,
    Parameter,
    Repack,
    TensorMap,
    validate_contract,
)
from router_runtime.format.manifest import (
    Entry,
    Manifest,
    Resources,
    Toolchain,
    artifact_name,
    dumps,
    loads,
)
from router_runtime.format.target import BUILDABLE, Target

pytestmark = pytest.mark.one_torch

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
TEXT = st.text(max_size=12)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
SIZES = st.integers(0, 2**31 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
INT64 = st.integers(-(2**63), 2**63 - 1)
CONSTANTS = st.dictionaries(NAMES, INT64 | FINITE | NAMES, max_size=4)
SCALARS = sorted(set(PARAMETER_TYPES) - {"tensormap"})


@st.composite
def axes(draw: st.DrawFn, cluster: int) -> GridAxis:
    forms: list[Literal["constant", "ceil", "ceil_capped_at_sms"]]
    forms = ["constant", "ceil", "ceil_capped_at_sms"]
    form = draw(st.sampled_from(forms))
    value = cluster * draw(st.integers(1, 100))
    if form == "constant":
        return GridAxis(form, value)
    return GridAxis(form, value, draw(NAMES), draw(st.integers(1, 1000)))


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    maps = draw(st.lists(st.sampled_from(names), unique=True, max_size=2)) if names else []
    parameters = [
        Parameter(name, "tensormap" if name in maps else draw(st.sampled_from(SCALARS)))
        for name in names
    ]
    cluster = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (16, 1, 1)]))
    pairs = st.tuples(st.integers(1, 256), st.integers(1, 256))
    limits = st.tuples(SIZES, SIZES).map(lambda pair: (min(pair), max(pair)))
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    repacks = (
        (Repack(draw(st.sampled_from(names)), draw(NAMES), 8, (2,) * len(order), tuple(order)),)
        if draw(st.booleans()) and names
        else ()
    )
    return Contract(
        parameters=tuple(parameters),
        grid=(draw(axes(cluster[0])), draw(axes(cluster[1])), draw(axes(cluster[2]))),
        block=(draw(st.integers(1, 1024)), 1, 1),
        cluster=cluster,
        dynamic_shared_memory=draw(SIZES),
        programmatic_dependent_launch=draw(st.booleans()),
        workspace_bytes=draw(SIZES) if "workspace" in names else 0,
        tensor_maps=tuple(
            TensorMap(
                name,
                draw(NAMES),
                draw(st.sampled_from(["bf16", "f32"])),
                draw(pairs),
                draw(st.sampled_from(["none", "32B", "64B", "128B"])),
            )
            for name in maps
        ),
        repacks=repacks,
        limits=draw(st.dictionaries(NAMES, limits, max_size=3)),
    )


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kernel, variant, sha256 = draw(NAMES), draw(NAMES), draw(DIGESTS)
    model = draw(st.none() | NAMES)
    target = draw(st.sampled_from(BUILDABLE))
    counts = sorted(draw(st.sets(st.integers(1, 2**20), max_size=3)))
    figures = st.floats(1e-3, 1e6)
    return Entry(
        kernel=kernel,
        model=model,
        target=target,
        variant=variant,
        constants=draw(CONSTANTS),
        file=artifact_name(kernel, model, target, variant, sha256),
        sha256=sha256,
        size=draw(st.integers(1, 2**31 - 1)),
        symbol=draw(st.from_regex(r"[!-~]{1,20}", fullmatch=True)),
        contract=draw(contracts()),
        source_sha256=draw(DIGESTS),
        numerics=draw(st.none() | TEXT),
        resources=Resources(*(draw(SIZES) for _ in range(5))),
        latency=tuple((tokens, draw(figures)) for tokens in counts),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    toolchain = Toolchain(
        draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        draw(st.dictionaries(TEXT, st.lists(TEXT, max_size=2).map(tuple), max_size=2)),
    )
    found = draw(st.lists(entries(), max_size=3, unique_by=lambda entry: entry.key))
    found.sort(key=lambda entry: entry.key)
    return Manifest(draw(DIGESTS), toolchain, tuple(found))


@given(manifests())
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    data = dumps(manifest)
    assert loads(data) == manifest
    assert dumps(loads(data)) == data
    assert data.isascii()


@given(manifests(), st.randoms())
def test_equal_manifests_are_equal_bytes(manifest: Manifest, random: Any) -> None:
    shuffled = random.sample(manifest.entries, len(manifest.entries))
    assert dumps(dataclasses.replace(manifest, entries=tuple(shuffled))) == dumps(manifest)


@given(contracts())
def test_a_contract_comes_back(contract: Contract) -> None:
    validate_contract(contract, "contract")
    text = json.dumps(encode(contract))
    assert decode(Contract, parse_json(text.encode(), "a contract"), "contract") == contract


@given(manifests(), st.data())
def test_a_missing_or_an_unknown_key_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    document = json.loads(dumps(manifest))
    objects = [document, document["toolchain"]]
    for entry in document["entries"]:
        objects += [entry, entry["contract"], entry["resources"], *entry["contract"]["grid"]]
    chosen = data.draw(st.sampled_from(objects))
    if data.draw(st.booleans()):
        del chosen[data.draw(st.sampled_from(sorted(chosen)))]
    else:
        chosen["unknown"] = 1
    with pytest.raises(FormatError, match=r"keys|format version"):
        loads(json.dumps(document).encode())


JSON = st.recursive(
    st.none() | st.booleans() | INT64 | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "a value") == value


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(FormatError, match="expected"):
        loads(data)


@given(JSON)
def test_whatever_does_not_fit_is_refused_in_words(value: Any) -> None:
    with pytest.raises(FormatError, match=r"^x"):
        decode(Contract, value, "x")


@pytest.mark.parametrize("value", ["", "two words", 'a"b', "1st", "a/b", "é"])
def test_a_constant_that_is_no_plain_name_is_refused(build: SimpleNamespace, value: str) -> None:
    entry = build.entry("hash_router", build.hash(), constants={"FORM": value})
    with pytest.raises(FormatError, match="constant FORM: expected a number or a plain name"):
        dumps(build.manifest([entry]))


def test_a_named_constant_comes_back(build: SimpleNamespace) -> None:
    constants = {"FORM": "swap_ab", "MMA": "wgmma", "HIDDEN": 4096, "SCALE": 1.5}
    entry = build.entry("hash_router", build.hash(), constants=constants)
    (found,) = loads(dumps(build.manifest([entry]))).entries
    assert found.constants == constants


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}])
def test_a_constant_of_another_type_is_refused(build: SimpleNamespace, value: Any) -> None:
    entry = build.entry("hash_router", build.hash(), constants={"FORM": 1})
    document = json.loads(dumps(build.manifest([entry])))
    document["entries"][0]["constants"]["FORM"] = value
    with pytest.raises(FormatError, match=r"entries\[0\]\.constants\.FORM: expected"):
        loads(json.dumps(document).encode())


@pytest.mark.parametrize("text", ["sm_90b", "sm_9", "SM_90a", "sm_120f", "sm_103f"])
def test_a_target_or_a_family_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=f"expected a target such as .*, found '{text}'"):
        Target.parse(text)


def test_a_format_error_is_an_error_of_the_runtime() -> None:
    with pytest.raises(RouterRuntimeError):
        Target.parse("sm_90b")
    assert issubclass(FormatError, ValueError)
