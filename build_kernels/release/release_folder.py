"""The folder of one release below ``dist/``: put into place at once, and never changed.

Only a release's envelope can be added or replaced, which is one file and one rename.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_kernels import publish
from build_kernels.errors import BuildError
from router_runtime.evidence.release import verify
from router_runtime.format.provenance import ENVELOPE_SUFFIX, STATEMENT_SUFFIX


@dataclass(frozen=True, slots=True)
class Result:
    """A release in its folder. ``made``: whether it was not there already."""

    folder: Path
    made: bool
    signed: bool


def put(
    out: Path,
    files: dict[str, bytes],
    sign: Callable[[bytes], bytes] | None,
    staging: Path,
) -> Result:
    """Put a release into its folder below ``out``, or only its envelope if it is there already.

    Args:
        out: The folder below which releases are.
        files: Its files by name, without the envelope.
        sign: Returns the envelope of a statement. None: the release is unsigned.
        staging: A folder on the same file system.

    Raises:
        BuildError: The folder holds another release, or a receiver would refuse this one.

    """
    (statement,) = (name for name in files if name.endswith(STATEMENT_SUFFIX))
    start = statement.removesuffix(STATEMENT_SUFFIX)
    envelope = start + ENVELOPE_SUFFIX
    if sign is not None:
        files = {**files, envelope: sign(files[statement])}
    place = out / start
    if place.is_dir():
        _compare_with_existing(place, files, envelope)
        if envelope in files:
            # Written elsewhere first: half an envelope must never be among a release's files.
            publish.write_file(staging / envelope, files[envelope])
            os.replace(staging / envelope, place / envelope)
            publish.sync(place)
        return Result(place, made=False, signed=(place / envelope).exists())
    fresh = staging / "release"
    fresh.mkdir(mode=0o755)
    for name, data in files.items():
        publish.write_file(fresh / name, data)
    fresh.chmod(0o755)
    # What a receiver would refuse is not published.
    verify([fresh], None)
    os.rename(fresh, place)
    publish.sync(out)
    return Result(place, made=True, signed=envelope in files)


def _compare_with_existing(place: Path, files: Mapping[str, bytes], envelope: str) -> None:
    found = {path.name: path.read_bytes() for path in place.iterdir() if path.name != envelope}
    made = {name: data for name, data in files.items() if name != envelope}
    wrong = sorted(name for name in {*found, *made} if found.get(name) != made.get(name))
    if wrong:
        raise BuildError(
            f"expected {place} to hold the same release, found {', '.join(wrong)} to differ; a "
            "release is never overwritten; next: find out why, then another --out, or remove it"
        )
