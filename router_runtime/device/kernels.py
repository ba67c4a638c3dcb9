"""One artifacts folder on one device: manifest, evidence, device facts, loaded kernels."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts, list_artifacts, read_manifest
from router_runtime.device.dispatch import Dispatch, dispatch
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.loader import load_entry
from router_runtime.device.resolve import Request, Resolution, resolve, status_if_fitting
from router_runtime.errors import TrustError, explain
from router_runtime.evidence.status import status
from router_runtime.evidence.store import files, folders, read_evidence
from router_runtime.format.manifest import MANIFEST_NAME, Entry
from router_runtime.trust import policy as trust

_log = logging.getLogger(__name__)


class Kernels:
    """Resolves requests on a device and loads what was chosen. Made by ``kernels_on``."""

    def __init__(self, folder: Path, device: int) -> None:
        self.folder = folder
        self.device = device
        self.facts = driver.device_facts(device)
        self._policy = trust.policy()
        self.manifest = read_manifest(folder)
        self._evidence = read_evidence(folder)
        self._status: dict[str, str] = {}
        _log.debug(
            "artifacts %s: %d entries, for cuda:%d, %s; evidence of %s; signature policy: %s",
            *(folder, len(self.manifest.entries), device, self.facts),
            *(", ".join(map(str, self.evidence_folders)), self._policy),
        )

    @property
    def evidence_folders(self) -> tuple[Path, ...]:
        """The folders from which evidence was read."""
        return folders(self.folder)

    def status(self, entry: Entry) -> str:
        """The status of ``entry`` on devices like this one, by the shipped and the user's own
        evidence. Computed once.
        """
        known = self._status.get(entry.key)
        if known is None:
            known = status(entry, self.manifest, self._evidence, self.facts.capability)
            self._status[entry.key] = known
        return known

    def resolve(self, request: Request) -> Resolution:
        """Return which entry serves ``request`` on this device, and why the others do not."""
        status_of = self._status_for([request])
        found = resolve(request, self.facts, self.manifest, status_of, self.folder)
        _log_decision(found)
        return found

    def dispatch(self, requests: Sequence[Request]) -> Dispatch:
        """Return which entries serve which batch sizes of ``requests``, which compute the same."""
        status_of = self._status_for(requests)
        found = dispatch(requests, self.facts, self.manifest, status_of, self.folder)
        for resolution in found.resolutions:
            _log_decision(resolution)
        return found

    def _status_for(self, requests: Sequence[Request]) -> Callable[[Entry], str]:
        return status_if_fitting(requests, self.facts, self.status)

    def load(self, request: Request) -> LoadedKernel:
        """The loaded kernel that serves ``request``. Raises ResolutionError if none does."""
        return self.load_entry(self.resolve(request).require())

    def load_entry(self, entry: Entry) -> LoadedKernel:
        """Load ``entry``, once per device and digest.

        Raises TrustError if the manifest was read before the policy that is in force now.
        """
        if self._policy is not trust.policy():
            raise TrustError(
                explain(
                    f"kernels of {self.folder}",
                    expected="a manifest read under the signature policy in force",
                    found="one read before it",
                    remedy="build the Router again",
                )
            )
        return load_entry(entry, self.manifest, self.folder, self.device)


def _log_decision(resolution: Resolution) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s:\n%s", resolution.request, resolution.trace())


_lock = threading.Lock()
_cache: dict[tuple[Path, int], tuple[object, Kernels]] = {}


def kernels_on(device: int, artifacts: str | os.PathLike[str] | None = None) -> Kernels:
    """The kernels of an artifacts folder (see ``find_artifacts``) on device ``device``.

    The folder is read again when its manifest or its evidence has changed since the last call, so a
    Router built after ``router-runtime verify --record`` sees what was recorded.
    """
    folder = find_artifacts(artifacts).resolve()
    signature = _signature(folder)
    with _lock:
        cached = _cache.get((folder, device))
        if cached is None or cached[0] != signature:
            cached = _cache[folder, device] = (signature, Kernels(folder, device))
        return cached[1]


def _signature(folder: Path) -> object:
    """Return a value that changes when what ``Kernels`` reads has changed: the signature policy,
    and the inode, the size and the time of the manifest and of each record. None is opened.
    """
    list_artifacts(folder)  # before the evidence in it: one command then mends both
    records, _ = files(folder)
    read = [folder / MANIFEST_NAME, *records]
    return [trust.policy(), [(str(file), _identity(file)) for file in read]]


def _identity(file: Path) -> object:
    """Return the inode, the size and the time of a file. None if it no longer exists: another
    process may just have replaced a record by a newer one.
    """
    try:
        stat = file.lstat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
