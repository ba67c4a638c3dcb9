"""Files altered, exchanged, cut, linked or written by an attacker: every attack ends in a refusal.

What a signature policy adds is in ``test_trust.py``; these hold without one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router_runtime.device import artifact_store as artifacts
from router_runtime.device.kernels import kernels_on
from router_runtime.device.loader import load_entry
from router_runtime.device.resolve import Request
from router_runtime.errors import ArtifactError, FormatError, RouterRuntimeError
from router_runtime.evidence import record as records
from router_runtime.evidence import store
from router_runtime.evidence.ladder import STATUSES
from router_runtime.evidence.status import status
from router_runtime.format import provenance
from router_runtime.format.codec import encode, parse_json
from router_runtime.format.manifest import MANIFEST_NAME, artifact_name, dumps
from tests.runtime import releases

#: What a reader of an artifacts folder may raise, and nothing else.
REFUSALS = RouterRuntimeError


@pytest.fixture
def folder(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    """An installed release: artifacts, evidence and marker."""
    fake.entries = build.small()
    path: Path = build.artifacts(tmp_path / "artifacts", fake.entries)
    releases.add_evidence(path / "evidence", fake.entries)
    releases.add_marker(path)
    return path


def load_all(folder: Path) -> None:
    """What Routers and ops on a device do to load, for every entry of the manifest."""
    kernels = kernels_on(0, folder)
    for entry in kernels.manifest.entries:
        kernels.load(Request(entry.kernel, variant=entry.variant))


def test_the_folder_is_fine(folder: Path, fake: Any) -> None:
    load_all(folder)
    assert fake.calls.count("cuLibraryLoadData") == len(fake.entries)


def flips(data: bytes, count: int = 60) -> Iterator[bytes]:
    """``data`` with one bit changed, at places spread over all of it."""
    draw = random.Random(len(data))
    for position in (0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))):
        changed = bytearray(data)
        changed[position] ^= 1 << draw.randrange(8)
        yield bytes(changed)


# --- cubins --------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_cubin(folder: Path, fake: Any) -> None:
    for entry in fake.entries:
        path = folder / entry.file
        data = path.read_bytes()
        for changed in flips(data, 8):
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match="altered"):
                artifacts.read_cubin(entry, folder)
        path.write_bytes(data)
    load_all(folder)


def test_cubins_that_changed_places(folder: Path, fake: Any) -> None:
    first, second = (folder / entry.file for entry in fake.entries[:2])
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    with pytest.raises(ArtifactError, match=r"truncated|a longer file|altered"):
        load_all(folder)


@pytest.mark.parametrize("kept", [0, 1, 51, 63, -1])
def test_a_truncated_cubin(folder: Path, fake: Any, kept: int) -> None:
    path = folder / fake.entries[0].file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"\(truncated\)"):
        load_all(folder)


def replaced(build: SimpleNamespace, folder: Path, code: bytes, **changes: Any) -> Path:
    """A folder whose one cubin is ``code``, with a manifest that has its digest right."""
    entry = build.entry("hash_router", build.hash(), **changes)
    sha256 = hashlib.sha256(code).hexdigest()
    parts = (entry.kernel, entry.model, entry.target, entry.variant)
    document = json.loads(dumps(build.manifest([entry])))
    file = artifact_name(*parts, sha256)
    document["entries"][0].update(file=file, sha256=sha256, size=len(code))
    folder.mkdir()
    (folder / file).write_bytes(code)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    return folder


HEADER = struct.pack("<6s10xHH28xI12x", b"\x7fELF\x02\x01", 2, 190, 90 << 8)


def elf(**fields: int) -> bytes:
    """A cubin's header for sm_90a, with some fields changed."""
    data = bytearray(HEADER)
    places = {"kind": (4, 1), "type": (16, 2), "machine": (18, 2), "flags": (48, 4)}
    for name, value in fields.items():
        offset, size = places[name]
        data[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "code",
    [
        b".version 9.1\n.target sm_90a\n.address_size 64\n.visible .entry hash_router() { ret; }\n",
        b"\x50\xed\x55\xba\x01\x00\x10\x00" + bytes(64),  # a fat binary
        b"\xb1\x43\x62\x46\x01\x00\x00\x00" + bytes(64),  # the wrapper of one
        b"\x7fELF",
        b"!<arch>\n" + bytes(64),
        b"BC\xc0\xde" + bytes(64),  # LLVM bitcode
        elf(kind=1),  # 32 bit
        elf(type=1),  # relocatable: it would be linked
        elf(machine=62),  # a host program, which may carry a fat binary
        elf(flags=100 << 8),  # a cubin for sm_100a
    ],
    ids=[
        *("ptx", "fatbin", "wrapper", "short", "archive", "bitcode"),
        *("elf32", "relocatable", "host", "sm_100a"),
    ],
)
def test_nothing_but_machine_code_for_the_target(
    build: SimpleNamespace, fake: Any, tmp_path: Path, code: bytes
) -> None:
    """The digest in the manifest is right, and a driver would take some of these and compile."""
    folder = replaced(build, tmp_path / "artifacts", code)
    with pytest.raises(ArtifactError, match="expected machine code for sm_90a"):
        kernels_on(0, folder).load(Request("hash_router", variant="portable"))
    assert "cuLibraryLoadData" not in fake.calls


def test_that_header_is_what_passes(build: SimpleNamespace, fake: Any, tmp_path: Path) -> None:
    """The parametrisation above differs from a good file in the one field each."""
    folder = replaced(build, tmp_path / "artifacts", elf())
    (entry,) = artifacts.read_manifest(folder).entries
    assert artifacts.read_cubin(entry, folder) == elf()


def test_a_cubin_that_changes_after_the_check(
    folder: Path, fake: Any, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced at the moment its digest is taken: the driver gets what was hashed."""
    entry = fake.entries[0]
    manifest = artifacts.read_manifest(folder)
    given: list[bytes] = []
    loading = fake.cuLibraryLoadData

    def sha256(data: bytes) -> Any:
        (folder / entry.file).write_bytes(b"another program")
        return hashlib.sha256(data)

    def load(code: bytes, *rest: Any) -> Any:
        given.append(code)
        return loading(code, *rest)

    monkeypatch.setattr(artifacts, "hashlib", SimpleNamespace(sha256=sha256))
    monkeypatch.setattr(fake, "cuLibraryLoadData", load, raising=False)
    load_entry(entry, manifest, folder, 0)
    assert (folder / entry.file).read_bytes() == b"another program"
    assert given == [build.code(entry)]


# --- links and other kinds of file ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest", "cubin", "evidence", "marker"])
@pytest.mark.parametrize("kind", ["outside", "inside", "dangling", "pipe", "folder"])
def test_only_plain_files_are_read(folder: Path, fake: Any, name: str, kind: str) -> None:
    path = {
        "manifest": folder / MANIFEST_NAME,
        "cubin": folder / fake.entries[0].file,
        "evidence": next((folder / "evidence").iterdir()),
        "marker": next(folder.glob("*" + provenance.MARKER_SUFFIX)),
    }[name]
    moved = {"outside": folder.parent / "elsewhere", "inside": path.with_name("moved")}.get(kind)
    if moved is not None:
        path.rename(moved)
        path.symlink_to(moved)
    else:
        path.unlink()
        if kind == "dangling":
            path.symlink_to("/nowhere")
        elif kind == "pipe":
            os.mkfifo(path)  # opening one waits for a writer, without O_NONBLOCK
        else:
            path.mkdir()
    with pytest.raises(ArtifactError, match=r"a link to|not a plain file|expected manifest\.json"):
        load_all(folder)


@pytest.mark.parametrize("name", ["../a.cubin", "..", "/etc/passwd", "a/../b.cubin", "\0.cubin"])
def test_names_that_lead_elsewhere(folder: Path, name: str) -> None:
    for path, refusal in (
        (folder / MANIFEST_NAME, FormatError),
        (next((folder / "evidence").iterdir()), ArtifactError),
    ):
        data = path.read_bytes()
        document = json.loads(data)
        (document["entries"][0] if "entries" in document else document)["file"] = name
        path.write_text(json.dumps(document))
        with pytest.raises(refusal, match=r"plain \.cubin file name|expected the file"):
            load_all(folder)
        path.write_bytes(data)
    load_all(folder)


# --- manifests -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_released_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    for changed in flips(path.read_bytes(), 200):
        path.write_bytes(changed)
        with pytest.raises(REFUSALS):
            artifacts.read_manifest(folder)


def test_a_truncated_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    data = path.read_bytes()
    for kept in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(REFUSALS):
            artifacts.read_manifest(folder)


def test_entries_that_changed_places_in_the_manifest(folder: Path, fake: Any) -> None:
    """Files, digests and sizes are consistent; only the names are wrong."""
    (marker,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    marker.unlink()
    for first, second in ((0, 1), (1, 2), (3, 4), (5, 6)):
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
        one, two = document["entries"][first], document["entries"][second]
        for name in ("file", "sha256", "size"):
            one[name], two[name] = two[name], one[name]
        path = folder / MANIFEST_NAME
        data = path.read_bytes()
        path.write_text(json.dumps(document))
        with pytest.raises(FormatError, match="expected the file"):
            artifacts.read_manifest(folder)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.9"}, r"expected runtime 0\.1\.0 .*found version 0\.0\.9"),
        ({"manifest_sha256": "8" * 64}, f"manifest_sha256 {'8' * 64}"),
        ({"targets": ("sm_100a",)}, "no target sm_90a"),
    ],
)
def test_a_manifest_of_another_release(folder: Path, changes: dict[str, Any], message: str) -> None:
    (path,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    path.unlink()
    releases.add_marker(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        artifacts.read_manifest(folder)


def test_a_marker_under_another_name(folder: Path) -> None:
    (path,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    path.rename(folder / f"other_package-0.1.0{provenance.MARKER_SUFFIX}")
    with pytest.raises(ArtifactError, match="these files are of different releases"):
        artifacts.read_manifest(folder)


def test_two_releases_in_one_folder(folder: Path) -> None:
    releases.add_marker(folder, distribution="dsv4-router-runtime-sm90a")
    message = "pip uninstall -y dsv4-router-runtime dsv4-router-runtime-sm90a"
    with pytest.raises(ArtifactError, match=f"expected one release.*{message}"):
        artifacts.read_manifest(folder)


def test_a_manifest_that_changes_between_two_reads(
    folder: Path, fake: Any, build: SimpleNamespace
) -> None:
    """One reading is one manifest: entries of another one are not mixed in."""
    before = kernels_on(0, folder)
    (marker,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    marker.unlink()
    fake.entries = [*fake.entries, *build.small(workspace=64)]
    newer = build.small(workspace=64)
    build.artifacts(folder, newer)
    after = kernels_on(0, folder)
    assert after is not before
    changed = next(entry for entry in newer if entry not in before.manifest.entries)
    with pytest.raises(ArtifactError, match="expected an entry of the manifest"):
        before.load_entry(changed)
    after.load_entry(changed)


# --- evidence ------------------------------------------------------------------------------------

_ORDER = tuple(reversed(STATUSES))


def standings(folder: Path) -> list[int]:
    manifest = artifacts.read_manifest(folder)
    found = store.read_evidence(folder)
    return [_ORDER.index(status(entry, manifest, found, None)) for entry in manifest.entries]


def test_a_flipped_bit_in_evidence_proves_nothing_more(folder: Path, fake: Any) -> None:
    """It is refused, or it is in a digest that only recomputing can check and proves no more than
    before. A signature policy refuses both.
    """
    paths = sorted((folder / "evidence").iterdir())
    for path in paths[1:]:
        path.unlink()
    before = standings(folder)
    assert sum(before) == _ORDER.index("verified")
    refused = 0
    for changed in flips(paths[0].read_bytes(), 120):
        paths[0].write_bytes(changed)
        try:
            after = standings(folder)
        except REFUSALS:
            refused += 1
        else:
            assert all(late <= early for late, early in zip(after, before, strict=True))
    assert refused > 60


def test_truncated_evidence(folder: Path) -> None:
    path = next((folder / "evidence").iterdir())
    data = path.read_bytes()
    for kept in (0, 1, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:kept])
        with pytest.raises(ArtifactError, match="verify --record"):
            load_all(folder)


def test_records_that_changed_places(folder: Path) -> None:
    first, second = sorted((folder / "evidence").iterdir())[:2]
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    with pytest.raises(ArtifactError, match="expected the name"):
        load_all(folder)


def test_a_record_for_another_cubin(folder: Path, fake: Any) -> None:
    """A genuine record, relabelled for a cubin that was never run."""
    entry = fake.entries[0]
    for path in (folder / "evidence").iterdir():
        path.unlink()
    record = releases.record_of(entry, sha256="a" * 64)
    (folder / "evidence" / record.file_name).write_bytes(
        json.dumps(encode(record), sort_keys=True).encode()
    )
    with pytest.raises(ArtifactError, match="expected the file"):
        load_all(folder)


# --- JSON ----------------------------------------------------------------------------------------

RUBBISH = {
    "nothing": b"",
    "null": b"null",
    "number": b"1",
    "list": b"[]",
    "deep lists": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "key twice": b'{"format_version": 1, "format_version": 1}',
    "not a number": b'{"format_version": NaN}',
    "infinity": b'{"format_version": -Infinity}',
    "overflow": b'{"format_version": 1e999}',
    "digits": b'{"format_version": ' + b"9" * 100_000 + b"}",
    "real version": b'{"format_version": 1.0}',
    "true version": b'{"format_version": true}',
    "UTF-16": '{"format_version": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"format_version": 1}',
    "bad UTF-8": b'{"format_version": "\xff"}',
    "two documents": b'{"format_version": 1}{"format_version": 1}',
    "comment": b'{"format_version": 1 /* trust me */}',
    "control character": b'{"format_version": "\n"}',
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish(folder: Path, name: str) -> None:
    for path in (folder / MANIFEST_NAME, next((folder / "evidence").iterdir())):
        data = path.read_bytes()
        path.write_bytes(RUBBISH[name])
        with pytest.raises(REFUSALS, match="expected"):
            load_all(folder)
        path.write_bytes(data)
    (marker,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    marker.write_bytes(RUBBISH[name])
    with pytest.raises(REFUSALS, match="expected"):
        load_all(folder)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_json(name: str) -> None:
    """Anywhere in the document, in fields of any type."""
    with pytest.raises(FormatError, match=f"expected finite numbers, found {name}"):
        parse_json(f'{{"any": [{name}]}}'.encode(), "a document")


@pytest.mark.parametrize(
    ("name", "limit"), [("manifest", "_MAX_MANIFEST"), ("evidence", "MAX_RECORD_BYTES")]
)
def test_a_file_without_end(folder: Path, name: str, limit: str) -> None:
    """A sparse file of 1 TiB takes no disk; reading it all would take the memory."""
    paths = {"manifest": folder / MANIFEST_NAME, "evidence": next((folder / "evidence").iterdir())}
    os.truncate(paths[name], 2**40)
    most = getattr(artifacts if name == "manifest" else store, limit)
    with pytest.raises(ArtifactError, match=f"expected at most {most} bytes .*a longer file"):
        load_all(folder)


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, containers included."""
    yield path
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield from leaves(value, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with one value replaced."""
    changed = place = copy.deepcopy(document)
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


WEIRD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**62, 2**70, -(2**70), 0.5, -0.0, 1e308),
    *("", "..", "a/b", "\0", "\ud800", "sm_90a\n", "x" * 100, [], [None], {}, {"": {}}),
)


@pytest.mark.parametrize("which", ["hash_router", "dense_router_prefill", "dense_router_decode"])
def test_every_value_replaced_by_every_weird_one(
    folder: Path, fake: Any, build: SimpleNamespace, which: str
) -> None:
    """Refused or loaded, with no other error, for any manifest."""
    (marker,) = folder.glob("*" + provenance.MARKER_SUFFIX)
    marker.unlink()
    entries = [entry for entry in fake.entries if entry.kernel == which]
    document = json.loads(dumps(build.manifest(entries)))
    refused = 0
    for path in [found for found in leaves(document) if found]:
        for value in WEIRD:
            changed = with_value(document, path, value)
            (folder / MANIFEST_NAME).write_text(json.dumps(changed))
            try:
                manifest = artifacts.read_manifest(folder)
                for entry in manifest.entries:
                    load_entry(entry, manifest, folder, 0)
            except REFUSALS:
                refused += 1
    assert refused > 500


def test_every_value_of_a_record_replaced_by_every_weird_one(folder: Path) -> None:
    paths = sorted((folder / "evidence").iterdir())
    data = paths[0].read_bytes()
    document = json.loads(data)
    document["cases"] = document["cases"][:2]
    refused = 0
    for path in [found for found in leaves(document) if found]:
        for value in WEIRD:
            changed = with_value(document, path, value)
            try:
                records.loads(json.dumps(changed).encode())
            except FormatError:
                refused += 1
    assert refused > 300
