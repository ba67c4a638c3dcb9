"""The artifacts folder: found, strict, and never different from its digests."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router_runtime.device import artifact_store as artifacts
from router_runtime.errors import ArtifactError, FormatError
from router_runtime.format import advice
from router_runtime.format import files as format_files
from router_runtime.format.manifest import MANIFEST_NAME, dumps, loads

pytestmark = pytest.mark.one_torch


@pytest.fixture
def folder(build: SimpleNamespace, tmp_path: Path) -> Path:
    path: Path = build.artifacts(tmp_path / "artifacts", build.small())
    return path


def test_intact_cubin_is_returned(build: SimpleNamespace, folder: Path) -> None:
    for entry in artifacts.read_manifest(folder).entries:
        assert artifacts.read_cubin(entry, folder) == build.code(entry)


def test_missing_cubin(build: SimpleNamespace, folder: Path) -> None:
    entry = build.small()[0]
    (folder / entry.file).unlink()
    with pytest.raises(ArtifactError, match=r"expected .*, found no such file; run: .*build --out"):
        artifacts.read_cubin(entry, folder)


def test_truncated_cubin(build: SimpleNamespace, folder: Path) -> None:
    entry = build.small()[0]
    (folder / entry.file).write_bytes(build.code(entry)[:-1])
    with pytest.raises(ArtifactError, match=rf"expected {entry.size} bytes .*\(truncated\)"):
        artifacts.read_cubin(entry, folder)


def test_longer_cubin(build: SimpleNamespace, folder: Path) -> None:
    entry = build.small()[0]
    (folder / entry.file).write_bytes(build.code(entry) + b"x")
    with pytest.raises(ArtifactError, match="a longer file"):
        artifacts.read_cubin(entry, folder)


def test_altered_cubin(build: SimpleNamespace, folder: Path) -> None:
    entry = build.small()[0]
    (folder / entry.file).write_bytes(b"X" + build.code(entry)[1:])
    with pytest.raises(ArtifactError, match=rf"expected sha256 {entry.sha256}.*altered"):
        artifacts.read_cubin(entry, folder)


def test_link_that_leads_outside(build: SimpleNamespace, folder: Path) -> None:
    entry = build.small()[0]
    outside = folder.parent / "elsewhere.cubin"
    outside.write_bytes(build.code(entry))
    (folder / entry.file).unlink()
    (folder / entry.file).symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"a file inside .*elsewhere\.cubin"):
        artifacts.read_cubin(entry, folder)


def test_linked_folder_is_fine(build: SimpleNamespace, folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert artifacts.read_cubin(build.small()[0], link)


@pytest.mark.parametrize("name", ["../a.cubin", "/a.cubin", "x/a.cubin", "..cubin", "a.bin"])
def test_path_outside_the_folder(folder: Path, name: str) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    document["entries"][0]["file"] = name
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"plain \.cubin file name"):
        artifacts.read_manifest(folder)


def test_unknown_key(folder: Path) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    document["entries"][0]["fallback"] = "ptx"
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"entries\[0\].*unknown \['fallback'\]"):
        artifacts.read_manifest(folder)


def test_newer_version(folder: Path) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    document["format_version"] += 1
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"expected manifest format version 1, found 2"):
        artifacts.read_manifest(folder)


def test_unreadable_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match=f"build_kernels build --out {folder}, with the opt"):
        artifacts.read_manifest(folder)


def test_argument_before_environment_before_default(
    build: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build.artifacts(tmp_path / "other", [])
    monkeypatch.setenv(advice.ARTIFACTS_VARIABLE, str(other))
    assert artifacts.find_artifacts() == other
    assert artifacts.find_artifacts(folder) == folder


def test_named_folder_is_used_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="named by the argument"):
        artifacts.find_artifacts(tmp_path)
    monkeypatch.setenv(advice.ARTIFACTS_VARIABLE, str(tmp_path))
    with pytest.raises(ArtifactError, match=f"named by {advice.ARTIFACTS_VARIABLE}"):
        artifacts.find_artifacts()


@pytest.mark.parametrize("built", [True, False])
def test_a_named_folder_without_artifacts_is_told_what_works(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    """``make build-cubins`` would fill another folder than the one that is read."""
    default, named = tmp_path / "default", tmp_path / "named"
    if built:
        build.artifacts(default, [])
    for module in (advice, artifacts):
        monkeypatch.setattr(module, "artifacts_places", lambda: (default, default))
    monkeypatch.setenv(advice.ARTIFACTS_VARIABLE, str(named))
    with pytest.raises(ArtifactError) as by_variable:
        artifacts.find_artifacts()
    with pytest.raises(ArtifactError) as by_argument:
        artifacts.find_artifacts(named)
    for raised, way in (
        (by_variable, f"unset {advice.ARTIFACTS_VARIABLE}"),
        (by_argument, "name none"),
    ):
        text = str(raised.value)
        assert "make build-cubins" not in text
        assert f"-m build_kernels build --out {named}, or name the folder" in text
        assert (f"; {way}, so that {default} is used, or build there: " in text) == built
    monkeypatch.setattr(advice, "checkout", lambda: None)
    assert advice.name_other(named, "", None).startswith("name none, and install a release wheel")
    assert "build-cubins" not in advice.name_other(named, "", default)


def test_a_wheel_named_as_the_artifacts_folder(tmp_path: Path) -> None:
    """The commands that the error names give a folder that is accepted."""
    file = tmp_path / "a.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"router_runtime/artifacts/{MANIFEST_NAME}", "{}")
    with pytest.raises(ArtifactError, match=r"a zip file; cubins need a folder") as caught:
        artifacts.find_artifacts(file)
    found = re.search(
        r"python (-m zipfile --extract .*?) DIR\) and name DIR/(\S+)", str(caught.value)
    )
    assert found is not None
    subprocess.run([sys.executable, *found[1].split(), tmp_path / "dir"], check=True)
    assert artifacts.find_artifacts(tmp_path / "dir" / found[2]).is_dir()


@pytest.mark.parametrize("mine", [True, False])
def test_files_that_this_user_may_not_read(
    build: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    entry = build.small()[0]
    chmod = "run: chmod -R u+rX" if mine else "run: sudo chmod -R a+rX"
    _refuse(monkeypatch, mine, [folder / MANIFEST_NAME, folder / entry.file])
    with pytest.raises(ArtifactError, match=rf"Permission denied.*; {re.escape(chmod)} {folder}"):
        artifacts.read_manifest(folder)
    with pytest.raises(ArtifactError, match=rf"Permission denied.*; {re.escape(chmod)} {folder}"):
        artifacts.read_cubin(entry, folder)


@pytest.mark.parametrize("mine", [True, False])
def test_a_folder_that_this_user_may_not_enter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    """Only that folder is to be opened, and no other file in it."""
    chmod = "run: chmod u+x" if mine else "run: sudo chmod a+x"
    _refuse(monkeypatch, mine, [], folder.parent)
    assert artifacts.find_artifacts(folder) == folder
    with pytest.raises(ArtifactError, match=rf"; {re.escape(chmod)} {folder.parent}(,|$)"):
        artifacts.read_manifest(folder)


def _refuse(
    monkeypatch: pytest.MonkeyPatch, mine: bool, files: Sequence[Path], closed: Path | None = None
) -> None:
    """Let the system refuse to open these files, and whatever is inside a closed folder, as it does
    for every user but root. ``mine``: whether this user owns them.
    """

    def refusing(call: Callable[..., Any], path: Any, *rest: Any, **options: Any) -> Any:
        found = Path(path) if isinstance(path, str | Path) else Path()
        if found in files or closed in found.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return call(path, *rest, **options)

    owner = os.geteuid()
    if closed is not None:
        monkeypatch.setattr(os, "stat", functools.partial(refusing, os.stat))
    monkeypatch.setattr(os, "open", functools.partial(refusing, os.open))
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != closed)
    monkeypatch.setattr(os, "geteuid", lambda: owner if mine else owner + 1)
    monkeypatch.setattr(format_files, "require_private", lambda *_: None)


def test_default_places(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(advice.ARTIFACTS_VARIABLE, raising=False)
    monkeypatch.setattr(advice, "__file__", str(tmp_path / "package" / "format" / "advice.py"))
    with pytest.raises(ArtifactError, match=advice.ARTIFACTS_VARIABLE):
        artifacts.find_artifacts()
    checkout = build.artifacts(tmp_path / "artifacts", [])
    assert artifacts.find_artifacts() == checkout
    installed = build.artifacts(tmp_path / "package" / "artifacts", [])
    assert artifacts.find_artifacts() == installed


@pytest.mark.parametrize(
    "latency", [((8, 1.0), (4, 2.0)), ((8, 1.0), (8, 2.0)), ((0, 1.0),), ((1, 0.0),), ((1, -2.0),)]
)
def test_latencies_that_make_no_sense(build: SimpleNamespace, latency: Any) -> None:
    entry = build.entry("hash_router", build.hash(), latency=latency)
    with pytest.raises(FormatError, match="latency: expected ascending token counts"):
        dumps(build.manifest([entry]))


def test_latencies_survive_the_manifest(build: SimpleNamespace) -> None:
    entry = build.entry("hash_router", build.hash(), latency=((1, 2.0), (64, 3.5)))
    (found,) = loads(dumps(build.manifest([entry]))).entries
    assert found.latency == ((1, 2.0), (64, 3.5))
