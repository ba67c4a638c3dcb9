"""Which source files an artifacts folder was built from, so that a checkout can compare itself.

The builder writes this note beside the manifest. It is part of no release, and nothing is served or
refused because of it. A file counts by what a compiler or an interpreter sees of it, so comments
and layout do not count; a change of a file may still change no cubin.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from router_runtime.errors import FormatError
from router_runtime.format.codec import canonical_json, parse_json
from router_runtime.format.source_digest import own_digest

SOURCES_NAME = "sources.json"


def note(root: Path, files: Iterable[Path]) -> bytes:
    """Return the bytes of the note about these files below ``root``: path -> digest."""
    return canonical_json({path.relative_to(root).as_posix(): own_digest(path) for path in files})


def changed_since(folder: Path, root: Path) -> tuple[str, ...]:
    """Return the files below ``root``, by their paths from there, that are not those from which the
    artifacts in ``folder`` were built; none if the folder has no note that can be read.
    """
    try:
        document = parse_json((folder / SOURCES_NAME).read_bytes(), SOURCES_NAME)
    except (OSError, FormatError):
        return ()
    if not isinstance(document, dict):
        return ()
    return tuple(name for name, digest in sorted(document.items()) if _now(root / name) != digest)


def _now(path: Path) -> str | None:
    try:
        return own_digest(path)
    except OSError:
        return None
