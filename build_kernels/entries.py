"""One compiled job -> one entry of the manifest."""

from __future__ import annotations

import dataclasses
import hashlib

from build_kernels.compile.contract_check import check_contract
from build_kernels.compile.instructions import Census, serialised, spills
from build_kernels.compile.job import Job
from build_kernels.contracts import declared
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format import cubin
from router_runtime.format.cubin import Cubin
from router_runtime.format.manifest import Entry, Resources, artifact_name


def identify(job: Job, data: bytes) -> Cubin:
    """Return the facts of a job's cubin. Raises BuildError for a damaged one, and for another
    target's or kernel's.
    """
    try:
        facts = cubin.read(data, job.key)
    except FormatError as error:
        raise BuildError(str(error)) from error
    if facts.target != job.target:
        raise BuildError(f"{job.key}: expected a cubin for {job.target}, found {facts.target}")
    if job.language == "cuda" and facts.symbol != job.kernel:
        raise BuildError(
            f'{job.key}: expected extern "C" __global__ {job.kernel}, found {facts.symbol}'
        )
    return facts


def inspect(job: Job, data: bytes, facts: Cubin, counts: Census) -> Entry:
    """Return the manifest entry of a compiled job.

    Args:
        job: What was compiled.
        data: The cubin.
        facts: What ``identify`` returned.
        counts: The census of the cubin's instructions.

    Raises:
        BuildError: The cubin does not match its contract, or its wgmma instructions do not overlap.

    """
    contract, _ = declared(job)
    check_contract(contract, facts, counts, job.key)
    if serialised(counts):
        raise BuildError(
            f"{job.key}: expected wgmma instructions that overlap, found a barrier before each; "
            "next: let nothing read an accumulator, and no loop begin again, while MMAs that "
            "write one are under way"
        )
    entry = planned(job, hashlib.sha256(data).hexdigest())
    return dataclasses.replace(
        entry, size=len(data), symbol=facts.symbol, resources=resources(facts, counts)
    )


def planned(job: Job, sha256: str) -> Entry:
    """Return the entry of a job whose cubin has this digest, without what can only be read
    from the cubin: ``size``, ``symbol`` and ``resources`` are empty.
    """
    contract, numerics = declared(job)
    return Entry(
        kernel=job.kernel,
        model=job.model,
        target=job.target,
        variant=job.variant,
        constants=job.constants,
        file=artifact_name(job.kernel, job.model, job.target, job.variant, sha256),
        sha256=sha256,
        size=0,
        symbol="",
        contract=contract,
        source_sha256=job.source_sha256,
        numerics=numerics,
        resources=Resources(0, 0, 0, 0, 0),
        latency=job.latency,
    )


def resources(facts: Cubin, counts: Census) -> Resources:
    """Return the manifest's record of what a cubin uses."""
    stores, loads = spills(counts)
    return Resources(
        registers=facts.registers,
        spill_stores=stores,
        spill_loads=loads,
        local_memory=facts.local_memory,
        static_shared_memory=facts.static_shared_memory,
    )
