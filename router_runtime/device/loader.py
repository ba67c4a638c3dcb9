"""From a manifest entry to a kernel that is loaded and checked on a device.

Everything happens here, once per device and entry, before the first launch: the bytes are compared
with their digest and handed to the driver, the loaded function is compared with the contract,
opt-in attributes are set, and the code is moved to the device. Nothing is left for a graph capture.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from router_runtime.device import driver
from router_runtime.device.artifact_store import read_cubin
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.launch_config import launch_config
from router_runtime.errors import ArtifactError, DriverError, explain
from router_runtime.format.advice import build_artifacts, build_for_device
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust

#: Dynamic shared memory that needs no opt-in.
_DEFAULT_SHARED_MEMORY = 48 * 1024

_log = logging.getLogger(__name__)

_lock = threading.Lock()
_loaded: dict[tuple[int, str, str], LoadedKernel] = {}


def load_entry(entry: Entry, manifest: Manifest, artifacts: Path, device: int) -> LoadedKernel:
    """Return ``entry`` of ``manifest``, loaded and checked on device ``device``. Thread-safe.

    It is loaded once per device, digest and entry. Raises ArtifactError for a file or a kernel that
    is not what the manifest says, TrustError for one that the signature policy refuses, and
    DriverError if the driver fails.
    """
    driver.refuse_fork()
    if entry not in manifest.entries:
        raise ArtifactError(
            explain(
                f"entry {entry.key}",
                expected="an entry of the manifest",
                found="one that is not in it",
                remedy="pass the entry that the resolver chose",
            )
        )
    # Here too: a policy that was set since covers what is already loaded.
    trust.admit(entry.file, entry.sha256, artifacts / entry.file)
    key = (device, entry.sha256, entry.key)
    with _lock:
        found = _loaded.get(key)
        if found is None or found.entry != entry:
            found = _loaded[key] = _load(entry, artifacts, device)
        return found


def _load(entry: Entry, artifacts: Path, device: int) -> LoadedKernel:
    facts = driver.device_facts(device)
    if not Target.parse(entry.target).runs_on(facts.major, facts.minor):
        raise ArtifactError(
            explain(
                f"entry {entry.key}",
                expected=f"a target that runs on cuda:{device}, {facts}",
                found=f"target {entry.target}",
                remedy=build_for_device(facts.major, facts.minor),
            )
        )
    code = read_cubin(entry, artifacts)
    with driver.context(device) as api:
        result = api.cuLibraryLoadData(code, [], [], 0, [], [], 0)
        if int(result[0]) in driver.REMEDIES:
            driver.check(result, f"cuLibraryLoadData of {entry.key}")
        if result[0]:
            raise ArtifactError(
                explain(
                    f"cubin of {entry.key}",
                    expected=f"code that {facts} accepts",
                    found=f"{result[0].name} from cuLibraryLoadData",
                    remedy=f"{build_artifacts()}; if it stays, update the driver",
                )
            )
        library = result[1]
        try:
            function = _checked_function(api, library, entry, device)
        except BaseException:
            api.cuLibraryUnload(library)
            raise
    _log.debug("loaded %s, sha256 %s, on cuda:%d", entry.key, entry.sha256, device)
    # The library stays loaded for the life of the process: captured graphs may hold its functions.
    return LoadedKernel(entry, function, device, facts.sms)


def _checked_function(api: Any, library: Any, entry: Entry, device: int) -> Any:
    """The function of ``entry`` in the current context, after every check against the contract."""
    contract = entry.contract
    result = api.cuLibraryGetKernel(library, entry.symbol.encode())
    if result[0]:
        raise ArtifactError(
            explain(
                f"cubin of {entry.key}",
                expected=f"a kernel called {entry.symbol}",
                found=result[0].name,
                remedy=build_artifacts(),
            )
        )
    kernel = result[1]
    _check_parameters(api, kernel, entry)
    ordinal = driver.check(api.cuDeviceGet(device), "cuDeviceGet")
    attributes = api.CUfunction_attribute

    def attribute(name: str) -> int:
        kind = getattr(attributes, f"CU_FUNC_ATTRIBUTE_{name}")
        value: int = driver.check(
            api.cuKernelGetAttribute(kind, kernel, ordinal), f"cuKernelGetAttribute({name})"
        )
        return value

    threads = contract.block[0] * contract.block[1] * contract.block[2]
    if threads > attribute("MAX_THREADS_PER_BLOCK"):
        raise ArtifactError(
            explain(
                f"kernel {entry.key}",
                expected=f"blocks of {threads} threads",
                found=f"at most {attribute('MAX_THREADS_PER_BLOCK')} with its registers",
                remedy=build_artifacts(),
            )
        )
    if contract.dynamic_shared_memory > _DEFAULT_SHARED_MEMORY:
        driver.check(
            api.cuKernelSetAttribute(
                attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                contract.dynamic_shared_memory,
                kernel,
                ordinal,
            ),
            f"cuKernelSetAttribute({contract.dynamic_shared_memory} bytes of shared memory)",
        )
    if contract.nonportable_cluster:
        driver.check(
            api.cuKernelSetAttribute(
                attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernel, ordinal
            ),
            "cuKernelSetAttribute(non-portable cluster size)",
        )
    function = driver.check(api.cuKernelGetFunction(kernel), "cuKernelGetFunction")
    driver.check(api.cuFuncLoad(function), "cuFuncLoad")
    if contract.cluster_size > 1:
        _check_cluster(api, function, entry, device)
    return function


def _check_parameters(api: Any, kernel: Any, entry: Entry) -> None:
    """Compare offset, size and number of the kernel's parameters with the contract's layout."""
    expected = entry.contract.parameter_layout(Target.parse(entry.target))
    found: list[tuple[int, int]] = []
    # One more than expected: a kernel with more parameters would read beyond the arguments.
    for index in range(len(expected) + 1):
        status, offset, size = api.cuKernelGetParamInfo(kernel, index)
        if status:
            break
        found.append((int(offset), int(size)))
    if tuple(found) != expected:
        raise ArtifactError(
            explain(
                f"parameters of {entry.key}",
                expected=f"(offset, size) {list(expected)} by its contract",
                found=found,
                remedy=build_artifacts(),
            )
        )


def _check_cluster(api: Any, function: Any, entry: Entry, device: int) -> None:
    """Refuse a cluster that no part of the device can hold: its first launch would fail."""
    result = api.cuOccupancyMaxActiveClusters(function, launch_config(entry.contract))
    if int(result[0]) in driver.REMEDIES:
        driver.check(result, f"cuOccupancyMaxActiveClusters of {entry.key}")
    if result[0] or result[1] < 1:
        raise DriverError(
            explain(
                f"kernel {entry.key}",
                expected=f"room for a cluster of {entry.contract.cluster_size} blocks, "
                f"{entry.contract.dynamic_shared_memory} bytes of shared memory each",
                found=f"{0 if result[0] else result[1]} on cuda:{device} ({result[0].name})",
                remedy="a MIG slice may be too small: use the whole GPU, or another variant",
            )
        )
