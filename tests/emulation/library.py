"""The emulation's own state inside a loaded kernel: settings, counters, errors."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from build_kernels.emulation.interface import COUNTS, ERRORS, FOUND_BY_HOST, PLACE_WORDS, mode
from router_runtime.device import driver
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.loader import load_entry
from router_runtime.format.manifest import Entry, Manifest


@dataclass(frozen=True)
class Report:
    """What happened since ``Library.start``.

    Attributes:
        counts: Name -> number.
        errors: Kind -> how often, and where the first one was. Empty for a correct kernel.

    """

    counts: Mapping[str, int]
    errors: Mapping[str, str]


class Library:
    """The variables of the model (build_kernels/emulation/model) in one loaded kernel."""

    def __init__(self, handle: Any, cluster: int) -> None:
        self._api = driver.bindings()
        self._handle = handle
        self._cluster = cluster
        self._reset()

    def start(self, name: str, limit_ms: int) -> None:
        """Set the mode, and how long a wait may take; forget what was counted."""
        torch.cuda.synchronize()
        self._write("tc_settings", struct.pack("<3I", mode(name), limit_ms, self._cluster))
        for variable in ("tc_counts", "tc_places", "tc_abandoned"):
            self._clear(variable)

    def report(self) -> Report:
        """Return what was counted. What a faulty kernel left behind is removed."""
        torch.cuda.synchronize()
        words = struct.unpack(f"<{len(COUNTS) + len(ERRORS)}Q", self._read("tc_counts"))
        counts = dict(zip(COUNTS, words, strict=False))
        numbers = dict(zip(ERRORS, words[len(COUNTS) :], strict=True))
        numbers["still_allocated"] = sum(map(bool, self._words("tc_taken")))
        first, end = self._words("tc_first"), self._words("tc_queued")
        numbers["still_queued"] = sum(a != b for a, b in zip(first, end, strict=True))
        numbers["unawaited"] = sum(self._words("tc_pending"))
        places = self._words("tc_places")
        errors = {}
        for index, (kind, number) in enumerate(numbers.items()):
            if number:
                place = places[index * PLACE_WORDS : (index + 1) * PLACE_WORDS]
                where = "" if kind in FOUND_BY_HOST else f", first: {_where(place)}"
                errors[kind] = f"{number} ({ERRORS[kind]}{where})"
        if errors:
            self._reset()
        return Report(counts, errors)

    def _reset(self) -> None:
        for name in ("tc_taken", "tc_first", "tc_queued", "tc_pending", "tc_copies", "tc_gathered"):
            self._clear(name)

    def _place(self, name: str) -> tuple[int, int]:
        found = self._api.cuLibraryGetGlobal(self._handle, name.encode())
        pointer, size = driver.check(found, f"cuLibraryGetGlobal({name})")
        return int(pointer), int(size)

    def _write(self, name: str, data: bytes) -> None:
        pointer, size = self._place(name)
        assert len(data) == size
        driver.check(self._api.cuMemcpyHtoD(pointer, data, size), f"cuMemcpyHtoD({name})")

    def _clear(self, name: str) -> None:
        pointer, size = self._place(name)
        driver.check(self._api.cuMemsetD8(pointer, 0, size), f"cuMemsetD8({name})")

    def _read(self, name: str) -> bytes:
        pointer, size = self._place(name)
        data = bytearray(size)
        driver.check(self._api.cuMemcpyDtoH(data, pointer, size), f"cuMemcpyDtoH({name})")
        return bytes(data)

    def _words(self, name: str) -> tuple[int, ...]:
        data = self._read(name)
        return struct.unpack(f"<{len(data) // 4}I", data)


def load(
    entry: Entry, manifest: Manifest, folder: Path, device: int
) -> tuple[LoadedKernel, Library]:
    """Return an emulated entry, loaded, and the variables of its model."""
    with _loaded_libraries() as handles:
        kernel = load_entry(entry, manifest, folder, device)
    (handle,) = handles
    with driver.context(device):
        return kernel, Library(handle, entry.contract.cluster_size)


@contextlib.contextmanager
def _loaded_libraries() -> Iterator[list[Any]]:
    """The handles of the libraries that are loaded meanwhile: a loaded kernel does not keep its
    own.
    """
    api = driver.bindings()
    original = api.cuLibraryLoadData
    handles: list[Any] = []

    def loading(*arguments: Any) -> Any:
        result = original(*arguments)
        handles.append(result[1])
        return result

    api.cuLibraryLoadData = loading
    try:
        yield handles
    finally:
        api.cuLibraryLoadData = original


def _where(words: tuple[int, ...]) -> str:
    x, y, z, thread, *about, rank = words
    hexadecimal = " ".join(f"{word:#x}" for word in about)
    return f"CTA ({x}, {y}, {z}) of rank {rank}, thread {thread}: {hexadecimal}"
