"""Synthetic entries, manifests and artifacts folders."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

from router_runtime.format.contract import Constants, Contract
from router_runtime.format.manifest import (
    MANIFEST_NAME,
    Entry,
    Manifest,
    Resources,
    Toolchain,
    artifact_name,
    dumps,
)
from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants
from router_runtime.format.target import Target
from tests.fake_driver.contracts import (
    activation_contract,
    dense_contract,
    hash_contract,
    prefill_contract,
    select_contract,
)

#: The numerics tag of the synthetic dense routers.
NUMERICS = "bf16-k16-f32/chunk256/epilogue1"

_SCORING = ("activation_topk", "hash_gate", "dense_router_decode", "dense_router_prefill")
_ZERO = "0" * 64


def make_entry(
    kernel: str,
    contract: Contract,
    *,
    model: str | None = None,
    target: str = "sm_90a",
    variant: str = "portable",
    constants: Constants | None = None,
    numerics: str | None = None,
    shared: int = 0,
    latency: tuple[tuple[int, float], ...] = (),
) -> Entry:
    """A manifest entry of a synthetic cubin.

    Args:
        kernel: Name of the kernel, also its symbol.
        contract: How it is launched.
        model: Name of the model it is compiled for; None for any.
        target: Such as ``sm_90a``.
        variant: Distinguishes entries of one kernel, model and target.
        constants: Its compile-time constants. Of a kernel that scores they say, if they are silent,
            that it does so by sqrtsoftplus.
        numerics: The tag of its summation order.
        shared: Bytes of static shared memory.
        latency: Measured (tokens, microseconds).

    """
    scores = scoring_constants(SQRT_SOFTPLUS, 1.0) if kernel in _SCORING else {}
    code = machine_code(kernel, model, target, variant)
    digest = hashlib.sha256(code).hexdigest()
    return Entry(
        kernel=kernel,
        model=model,
        target=target,
        variant=variant,
        constants={**scores, **(constants or {})},
        file=artifact_name(kernel, model, target, variant, digest),
        sha256=digest,
        size=len(code),
        symbol=kernel,
        contract=contract,
        source_sha256=_ZERO,
        numerics=numerics,
        resources=Resources(32, 0, 0, 0, shared),
        latency=latency,
    )


def machine_code(kernel: str, model: str | None, target: str, variant: str) -> bytes:
    """The bytes of a synthetic cubin: a cubin's header for the target, then text unique to it."""
    parsed = Target.parse(target)
    architecture = (parsed.major * 10 + parsed.minor) << 8
    header = struct.pack("<6s10xHH28xI12x", b"\x7fELF\x02\x01", 2, 190, architecture)
    return header + f"{kernel} {model} {target} {variant}".encode() * 8


def code_of(entry: Entry) -> bytes:
    """The bytes of the cubin of a synthetic entry."""
    return machine_code(entry.kernel, entry.model, entry.target, entry.variant)


def make_manifest(entries: list[Entry]) -> Manifest:
    """A manifest of these entries."""
    toolchain = Toolchain({"nvrtc": "13.5.37"}, {"cuda": ("-std=c++20",)})
    return Manifest(_ZERO, toolchain, tuple(entries))


def write_artifacts(folder: Path, entries: list[Entry]) -> Path:
    """Write the cubins of synthetic entries and their manifest; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        (folder / entry.file).write_bytes(code_of(entry))
    (folder / MANIFEST_NAME).write_bytes(dumps(make_manifest(entries)))
    return folder


def small_entries(target: str = "sm_90a", workspace: int = 0) -> list[Entry]:
    """Entries of every kernel, the dense ones for a model with H 128, E 24 and k 4."""
    small: dict[str, Any] = {
        "model": "small",
        "target": target,
        "constants": {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4},
        "numerics": NUMERICS,
    }
    dense = dense_contract(128, 24, workspace=workspace)
    return [
        make_entry("hash_router", hash_contract(), target=target),
        make_entry("topk_select", select_contract(1024), target=target, variant="row1024"),
        make_entry("topk_select", select_contract(65536), target=target, variant="row65536"),
        make_entry("activation_topk", activation_contract(16), target=target, variant="e16"),
        make_entry("activation_topk", activation_contract(256), target=target, variant="e256"),
        make_entry("dense_router_prefill", prefill_contract(128, 24), **small),
        make_entry("dense_router_decode", dense, **small),
    ]
