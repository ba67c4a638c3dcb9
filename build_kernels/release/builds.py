"""A finished build, read from an artifacts folder, a checkout, a wheel or a release's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format import wheel
from router_runtime.format.manifest import MANIFEST_NAME, Entry, Manifest, loads


@dataclass(frozen=True, slots=True)
class Build:
    """A manifest, and a function that returns the bytes of a file that it names."""

    manifest: Manifest
    read: Callable[[str], bytes]

    def cubin(self, entry: Entry) -> bytes:
        """Return an entry's cubin. Raises BuildError if it is missing or altered."""
        try:
            data = self.read(entry.file)
        except (FileNotFoundError, KeyError) as error:
            raise BuildError(
                f"expected the cubin {entry.file}, found none; next: make build-cubins"
            ) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BuildError(
                f"{entry.file}: expected the cubin that the manifest names, found it altered; "
                "next: make build-cubins, or fetch the release again"
            )
        return data


def open_build(path: Path) -> Build:
    """Return the build in a wheel, a release's folder, an artifacts folder or a built checkout.

    Raises BuildError if there is none, or one that this version cannot read.
    """
    wheels = [path] if path.is_file() else sorted(path.glob("*.whl"))
    if len(wheels) == 1:
        return of_wheel(_entries(wheels[0]), wheels[0].name)
    for folder in (path, path / "artifacts"):
        if (folder / MANIFEST_NAME).is_file():
            text = (folder / MANIFEST_NAME).read_bytes()
            return Build(_manifest(text, folder), _reader(folder))
    raise BuildError(
        f"expected a wheel, a release's folder, an artifacts folder or a built checkout, found "
        f"none in {path}; next: make build-cubins there"
    )


def of_wheel(entries: Mapping[str, bytes], where: str) -> Build:
    """Return the build in a wheel's entries. Raises BuildError, starting with ``where``."""
    name = wheel.ARTIFACTS + MANIFEST_NAME
    if name not in entries:
        raise BuildError(
            f"{where}: expected a wheel with {name}, found none; next: name a release's wheel"
        )
    return Build(_manifest(entries[name], where), lambda file: entries[wheel.ARTIFACTS + file])


def _entries(path: Path) -> dict[str, bytes]:
    try:
        return wheel.read(path.read_bytes(), path.name)
    except FormatError as error:
        raise BuildError(str(error)) from error


def _reader(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


def _manifest(data: bytes, where: object) -> Manifest:
    try:
        return loads(data)
    except FormatError as error:
        raise BuildError(
            f"{where}: {error}; next: make build-cubins, or fetch the release again"
        ) from error
