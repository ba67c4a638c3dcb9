"""What this machine can serve, in words: devices, driver, artifacts, evidence, and every decision.

Useful without a GPU too: then the decisions are shown for the device that each target of the
manifest was built for.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts, read_cubin, read_manifest
from router_runtime.device.dispatch import Dispatch, dispatch
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.device.resolve import Request, resolve
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.choice import DENSE
from router_runtime.evidence.status import status
from router_runtime.evidence.store import Evidence, folders, read_evidence
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust

#: What the present targets allow a block, for decisions about devices that are not here.
_SHARED_MEMORY_PER_BLOCK = 227 * 1024

Echo = Callable[[str], None]


def examine(artifacts: str | os.PathLike[str] | None, echo: Echo) -> bool:
    """Print the report. True if the artifacts and, where there is a GPU, its kernels are usable."""
    echo(f"python      {sys.version.split()[0]}")
    for package in ("torch", "cuda-bindings"):
        echo(f"{package:<12}{_version(package)}")
    devices = dict(_devices(echo))
    try:
        required = trust.policy()
        echo(f"signature   {f'required: {required}' if required else 'not required'}")
        folder = find_artifacts(artifacts)
        manifest = read_manifest(folder)
    except RouterRuntimeError as error:
        echo(f"artifacts   {error}")
        return False
    echo(f"artifacts   {folder.resolve()}: {len(manifest.entries)} entries")
    echo(f"source      {manifest.source_sha256}")
    packages = sorted(manifest.toolchain.packages.items())
    echo(f"toolchain   {', '.join(f'{name} {version}' for name, version in packages)}")
    intact = _check_cubins(manifest, folder, echo)
    try:
        evidence = Evidence(read_evidence(folder).records)  # every one, needed or not
    except (RouterRuntimeError, ValueError) as error:
        echo(f"evidence    {error}")
        return False

    def standing(entry: Entry) -> str:
        return status(entry, manifest, evidence)

    counts = dict.fromkeys(("verified", "source-verified", "unproven"), 0)
    for entry in manifest.entries:
        counts[standing(entry)] += 1
    read = " and ".join(str(each) for each in folders(folder))
    echo(f"evidence    {', '.join(f'{count} {name}' for name, count in counts.items())}: {read}")
    served = True
    for name, facts in (devices or _imagined(manifest)).items():
        echo("")
        echo(f"{name}: {facts}")
        for request in requests(manifest):
            resolution = resolve(request, facts, manifest, standing)
            if resolution.choice is None:
                served = served and not devices
                echo(f" {request}: nothing serves it")
            else:
                echo(f" {request}: {resolution.choice.key}")
            echo(resolution.trace())
        for asked in routers(manifest):
            found = dispatch(asked, facts, manifest, standing)
            constants = ", ".join(f"{name}={n}" for name, n in asked[0].constants.items())
            echo(f" dense router, {constants}: {_division(found)}")
            served = served and (bool(found.token_ranges) or not devices)
            for resolution in found.resolutions:
                echo(resolution.trace() or f"  no entry of {resolution.request.kernel}")
    return intact and served


def requests(manifest: Manifest) -> Iterator[Request]:
    """One request for each kernel of the manifest that serves alone, and for each range that only
    some variants of it serve.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in manifest.entries:
        if entry.kernel not in DENSE:
            groups.setdefault(entry.kernel, []).append(entry)
    for kernel, entries in sorted(groups.items()):
        ranges = {
            tuple(sorted((name, high) for name, (_, high) in entry.contract.limits.items()))
            for entry in entries
        }
        for quantities in sorted(ranges):
            yield Request(kernel, quantities=dict(quantities))


def routers(manifest: Manifest) -> Iterator[list[Request]]:
    """The requests of each dense router that the manifest has kernels for."""
    names = ("HIDDEN", "EXPERTS", "TOP_K")
    shapes = {
        tuple(entry.constants[name] for name in names)
        for entry in manifest.entries
        if entry.kernel in DENSE
    }
    for shape in sorted(shapes):
        yield [Request(kernel, dict(zip(names, shape, strict=True))) for kernel in DENSE]


def _division(found: Dispatch) -> str:
    texts = [f"{each.low} to {each.high} tokens by {each.entry.key}" for each in found.token_ranges]
    return "; ".join(texts) or "nothing serves it"


def _devices(echo: Echo) -> Iterator[tuple[str, DeviceFacts]]:
    try:
        version = driver.driver_version()
        count = driver.device_count()
    except RouterRuntimeError as error:
        echo(f"driver      {error}")
        return
    needed = f"{MINIMUM_DRIVER // 1000}.{MINIMUM_DRIVER % 1000 // 10}"
    verdict = "" if version >= MINIMUM_DRIVER else f", too old: CUDA {needed} is needed"
    echo(f"driver      for CUDA {version // 1000}.{version % 1000 // 10}{verdict}")
    for index in range(count):
        yield f"cuda:{index} {driver.device_name(index)}", driver.device_facts(index)


def _imagined(manifest: Manifest) -> dict[str, DeviceFacts]:
    """A device for each target, with the driver it needs."""
    targets = sorted({entry.target for entry in manifest.entries})
    return {
        f"a device for {target}": DeviceFacts(
            parsed.major, parsed.minor, MINIMUM_DRIVER, 1, _SHARED_MEMORY_PER_BLOCK
        )
        for target in targets
        for parsed in (Target.parse(target),)
    }


def _check_cubins(manifest: Manifest, folder: Path, echo: Echo) -> bool:
    bad = 0
    for entry in manifest.entries:
        try:
            read_cubin(entry, folder)
        except RouterRuntimeError as error:
            bad += 1
            echo(f"            {error}")
    echo(f"cubins      {len(manifest.entries) - bad} match their digest, {bad} do not")
    return not bad


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
