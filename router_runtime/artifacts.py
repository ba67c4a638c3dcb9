"""The artifacts folder: where it is, its manifest, and cubin bytes that match their digest.

Plain standard-library Python. Bytes that leave ``read_cubin`` are the bytes that were hashed: the
loader hands them to the driver without touching the file again, and nothing switches the check off.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from router_runtime import manifest as format_
from router_runtime.errors import ArtifactError, explain
from router_runtime.manifest import Entry, Manifest

ENVIRONMENT_VARIABLE = "ROUTER_RUNTIME_ARTIFACTS"
EVIDENCE_NAME = "evidence"

_BUILD = "run: make build-cubins"


def find_artifacts(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the manifest.

    In this order: the argument, the environment variable ``ROUTER_RUNTIME_ARTIFACTS``,
    ``artifacts`` inside the installed package (a wheel), ``artifacts`` beside the package (a
    checkout). A folder that was named is used or refused; the search goes on only when none was
    named.
    """
    named = explicit if explicit is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        folder = Path(named)
        if (folder / format_.MANIFEST_NAME).is_file():
            return folder
        source = "the argument" if explicit is not None else ENVIRONMENT_VARIABLE
        raise ArtifactError(
            explain(
                f"artifacts folder named by {source}",
                expected=f"{format_.MANIFEST_NAME} in {folder}",
                found="none",
                remedy=f"{_BUILD}, or name the folder that holds it",
            )
        )
    package = Path(__file__).resolve().parent
    tried = (package / "artifacts", package.parent / "artifacts")
    for folder in tried:
        if (folder / format_.MANIFEST_NAME).is_file():
            return folder
    raise ArtifactError(
        explain(
            "artifacts folder",
            expected=f"{format_.MANIFEST_NAME} in one of {[str(folder) for folder in tried]}",
            found="none",
            remedy=f"{_BUILD}, or set {ENVIRONMENT_VARIABLE}",
        )
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``. Raises ArtifactError or ManifestError."""
    path = folder / format_.MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            explain("manifest", expected=f"a readable {path}", found=error, remedy=_BUILD)
        ) from error
    return format_.loads(data)


def read_cubin(entry: Entry, folder: Path) -> bytes:
    """The bytes of ``entry``'s cubin, read once and equal to the manifest's size and digest.

    The manifest allows plain file names only. A link of that name is followed no further than the
    folder itself, so that what was published is what is read.
    """
    path = folder / entry.file
    what = f"cubin of {entry.key}"
    try:
        inside = path.resolve(strict=True).parent == folder.resolve(strict=True)
        if not inside:
            raise ArtifactError(
                explain(
                    what,
                    expected=f"a file inside {folder}",
                    found=f"{entry.file} leading to {path.resolve()}",
                    remedy=f"replace the link by the file, or {_BUILD}",
                )
            )
        with path.open("rb") as file:
            # One byte more than promised tells a longer file from a right one without reading it
            # all.
            data = file.read(entry.size + 1)
    except FileNotFoundError as error:
        raise ArtifactError(
            explain(what, expected=f"{path}", found="no such file", remedy=_BUILD)
        ) from error
    except OSError as error:
        raise ArtifactError(
            explain(what, expected=f"a readable {path}", found=error, remedy=_BUILD)
        ) from error
    if len(data) != entry.size:
        found = f"{len(data)} bytes (truncated)" if len(data) < entry.size else "a longer file"
        raise ArtifactError(
            explain(what, expected=f"{entry.size} bytes in {path}", found=found, remedy=_BUILD)
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise ArtifactError(
            explain(
                what,
                expected=f"sha256 {entry.sha256} of {path}",
                found=f"{digest} (altered)",
                remedy=_BUILD,
            )
        )
    return data
