"""Artifacts, evidence and keys that others may write are refused, and the error's command helps."""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from router_runtime.cli.main import main
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request
from router_runtime.errors import ArtifactError, TrustError
from router_runtime.evidence import store
from router_runtime.format import permissions
from router_runtime.format.manifest import MANIFEST_NAME
from router_runtime.trust import policy as trust
from tests.runtime import releases

#: A user who is neither root nor the one who runs the tests.
OTHER = 65534


@pytest.fixture
def folder(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    """Artifacts with evidence for every entry."""
    fake.entries = small(build)
    path: Path = build.artifacts(tmp_path / "artifacts", fake.entries)
    releases.add_evidence(path / "evidence", fake.entries)
    return path


def small(build: SimpleNamespace) -> list[Any]:
    """The entries of two kernels that have few cases."""
    return [each for each in build.small() if each.kernel in ("hash_router", "topk_select")]


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    permissions._only_member.cache_clear()
    yield
    permissions._only_member.cache_clear()


def load_all(folder: Path) -> None:
    kernels = kernels_on(0, folder)
    for entry in kernels.manifest.entries:
        kernels.load(Request(entry.kernel, variant=entry.variant))


def let_write(path: Path, bits: int) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


def parts(folder: Path) -> dict[str, Path]:
    """One path of each kind that is read."""
    return {
        "artifacts": folder,
        "manifest": folder / MANIFEST_NAME,
        "cubin": next(folder.glob("hash_router-*.cubin")),
        "marker": releases.add_marker(folder),
        "evidence": folder / "evidence",
        "record": next((folder / "evidence").glob("hash_router-*.json")),
    }


PARTS = ("artifacts", "manifest", "cubin", "marker", "evidence", "record")


def obey(error: BaseException) -> None:
    """Run the command that an error names."""
    command = re.search(r"then run: ([^,;]*)$", str(error))
    assert command, error
    subprocess.run(command[1], shell=True, check=True)


# --- modes ---------------------------------------------------------------------------------------


def test_an_edited_record_in_a_folder_that_all_may_write_proves_nothing(
    build: SimpleNamespace, fake: Any, tmp_path: Path
) -> None:
    """The attack: a kernel without evidence gets the record of another, edited by hand."""
    fake.entries = small(build)
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    proven, unproven = (each for each in fake.entries if each.kernel == "topk_select")
    releases.add_evidence(folder / "evidence", [proven])
    evidence = folder / "evidence"
    let_write(evidence, 0o777)
    (record,) = evidence.iterdir()
    document = json.loads(record.read_bytes())
    forged = releases.record_of(unproven, document["device"])
    store.write_record(forged, tmp_path / "attacker")
    (tmp_path / "attacker" / forged.file_name).rename(evidence / forged.file_name)
    for kernel in (proven, unproven):
        with pytest.raises(ArtifactError, match=r"evidence folder: .* mode 0777: every user may"):
            kernels_on(0, folder).load(Request("topk_select", variant=kernel.variant))
    done = CliRunner().invoke(main, ["doctor", "--artifacts", str(folder)])
    assert done.exit_code == 1
    assert f"chmod -R go-w {evidence}" in done.output
    assert "verified: chosen" not in done.output


@pytest.mark.parametrize("name", PARTS)
def test_what_every_user_may_write_is_refused(folder: Path, name: str) -> None:
    path = parts(folder)[name]
    let_write(path, 0o002)
    with pytest.raises(
        ArtifactError, match=rf"to be able to write {re.escape(str(path))}"
    ) as raised:
        load_all(folder)
    assert "every user may write; look through what it holds, then run: chmod" in str(raised.value)
    obey(raised.value)
    load_all(folder)


def leave_it(error: BaseException, folder: Path) -> None:
    """The error does not change the folder, but names a folder of one's own."""
    text = str(error)
    assert f"leave {folder} as it is, because others use it too" in text
    assert "mkdir -m 0700 DIR" in text
    assert "chmod" not in text
    assert "chown" not in text


@pytest.mark.parametrize("name", ["artifacts", "evidence"])
def test_a_folder_with_the_sticky_bit_is_left_as_it_is(folder: Path, name: str) -> None:
    """The sticky bit protects what is in a folder; new files can be added all the same. It marks
    folders of the machine, such as /tmp, which chmod -R would break.
    """
    path = parts(folder)[name]
    let_write(path, 0o002 | stat.S_ISVTX)
    with pytest.raises(ArtifactError, match="every user may write") as raised:
        load_all(folder)
    leave_it(raised.value, path)


def test_a_file_in_a_folder_with_the_sticky_bit(folder: Path) -> None:
    """The folder around a file is what the command would change, so it is what counts."""
    folder.chmod(0o755 | stat.S_ISVTX)
    let_write(folder / MANIFEST_NAME, 0o002)
    with pytest.raises(ArtifactError, match="every user may write") as raised:
        load_all(folder)
    leave_it(raised.value, folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("owner", [0, OTHER - 1])
def test_a_folder_with_files_of_others_is_left_as_it_is(folder: Path, owner: int) -> None:
    """Neither is the mode of others' files changed, nor are they taken from their owners."""
    (folder / "work").mkdir()
    theirs = folder / "work" / "theirs"
    theirs.touch()
    os.chown(theirs, OTHER, -1)
    os.chown(folder, owner, -1)
    let_write(folder, 0o002)
    with pytest.raises(ArtifactError, match="every user may write") as raised:
        load_all(folder)
    leave_it(raised.value, folder)


def test_a_folder_with_very_many_files_is_left_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_MOST_FILES", 3)
    let_write(folder, 0o002)
    with pytest.raises(ArtifactError, match="every user may write") as raised:
        load_all(folder)
    leave_it(raised.value, folder)


def test_one_command_mends_the_whole_folder(folder: Path) -> None:
    """As a checkout is that was made with umask 000."""
    for path in (folder, *folder.rglob("*")):
        let_write(path, 0o022)
    with pytest.raises(ArtifactError) as raised:
        load_all(folder)
    obey(raised.value)
    load_all(folder)


def test_what_all_may_read_and_only_root_may_write_is_fine(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        load_all(folder)
    finally:
        for path in (folder, folder / "evidence"):
            path.chmod(0o755)


def test_what_was_opened_is_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A safe file in its place right after it was opened changes nothing."""
    record = parts(folder)["record"]
    let_write(record, 0o002)
    genuine = os.open

    def opening(path: Any, *rest: Any, **options: Any) -> int:
        descriptor = genuine(path, *rest, **options)
        if Path(path) == record:
            safe = record.with_name("safe")
            safe.write_bytes(record.read_bytes())
            safe.rename(record)
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(ArtifactError, match="every user may write"):
        load_all(folder)


# --- owners --------------------------------------------------------------------------------------


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make another user the owner. Only root can: for others, this process becomes another user's,
    so that every file is.
    """

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, OTHER, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: OTHER)

    return give


@pytest.mark.parametrize("name", PARTS)
def test_what_another_user_owns_is_refused(
    folder: Path, name: str, give_away: Callable[[Path], None]
) -> None:
    path = parts(folder)[name]
    root = os.geteuid() == 0
    give_away(path)
    with pytest.raises(
        ArtifactError, match=r"found the owner .*; if you trust that owner, run: "
    ) as raised:
        load_all(folder)
    # To a user who is not root everything belongs to another here: the folder is met first.
    place = (path if path.is_dir() else path.parent) if root else folder
    assert f"or name a copy that is yours: cp -r {place} DIR" in str(raised.value)
    if root:
        assert f"run: chown -R 0 {place} && chmod -R go-w {place}, or" in str(raised.value)
        os.chown(path, 0, -1)
        load_all(folder)


def test_a_copy_of_what_another_user_owns_is_fine(
    folder: Path, tmp_path: Path, give_away: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_away(folder / MANIFEST_NAME)
    with pytest.raises(ArtifactError) as raised:
        load_all(folder)
    (command,) = re.findall(r"cp -r \S+ DIR", str(raised.value))
    subprocess.run(command.replace("DIR", str(tmp_path / "mine")), shell=True, check=True)
    monkeypatch.setattr(os, "geteuid", os.getuid)
    load_all(tmp_path / "mine")


def test_what_root_owns_serves_every_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's layers, or a package that root installed."""
    genuine = os.fstat

    def roots(descriptor: int) -> os.stat_result:
        found = genuine(descriptor)
        return os.stat_result((*found[:4], 0, *found[5:10]))

    monkeypatch.setattr(os, "fstat", roots)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    load_all(folder)


# --- groups --------------------------------------------------------------------------------------


def user(name: str, number: int, group: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", number, group, "", "/", "/bin/sh"))


@pytest.mark.parametrize(
    ("primary", "supplementary", "accepted"),
    [
        pytest.param(["me"], [], True, id="a group of one's own"),
        pytest.param(["me"], ["me"], True, id="named twice"),
        pytest.param([], ["me"], True, id="by name only"),
        pytest.param(["root"], [], True, id="root's"),
        pytest.param(["me", "other"], [], False, id="shared as the primary group"),
        pytest.param(["me"], ["other"], False, id="another member"),
        pytest.param(["other"], [], False, id="another's group"),
        pytest.param([], [], False, id="nobody known is in it"),
        pytest.param(["me"], ["gone"], False, id="a member who is no user"),
        pytest.param(["me"], None, False, id="a group without a name"),
    ],
)
@pytest.mark.parametrize("name", ["evidence", "manifest"])
def test_a_group_may_write_if_nobody_else_is_in_it(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    primary: Sequence[str],
    supplementary: Sequence[str] | None,
    accepted: bool,
) -> None:
    path = parts(folder)[name]
    let_write(path, 0o020)
    group = path.stat().st_gid
    numbers = {"me": os.geteuid(), "root": 0, "other": OTHER}
    users = {
        name: user(name, number, group if name in primary else 12345)
        for name, number in numbers.items()
    }

    def the_group(number: int) -> grp.struct_group:
        if supplementary is None:
            raise KeyError(number)
        return grp.struct_group(("some", "x", number, list(supplementary)))

    monkeypatch.setattr(pwd, "getpwall", lambda: list(users.values()))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: users[name])
    monkeypatch.setattr(grp, "getgrgid", the_group)
    if accepted:
        load_all(folder)
        return
    with pytest.raises(
        ArtifactError, match=r"mode 07?[67]?[67][54]: the group .* may write"
    ) as raised:
        load_all(folder)
    obey(raised.value)
    load_all(folder)


def only_root(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Every group has root as its only member; the result grows when all users are looked up."""
    asked: list[None] = []

    def all_users() -> list[pwd.struct_passwd]:
        asked.append(None)
        return []

    root = user("root", 0, 0)
    monkeypatch.setattr(pwd, "getpwall", all_users)
    monkeypatch.setattr(pwd, "getpwnam", lambda _: root)
    monkeypatch.setattr(grp, "getgrgid", lambda n: grp.struct_group(("g", "x", n, ["root"])))
    return asked


def test_an_access_list_is_not_overlooked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, the group's bits are the most that the users named in it may do."""
    only_root(monkeypatch)
    let_write(folder / MANIFEST_NAME, 0o020)
    monkeypatch.setattr(os, "listxattr", lambda _: ["system.posix_acl_access"])
    with pytest.raises(ArtifactError, match="mode 0664 and an access control list"):
        load_all(folder)


def test_a_file_system_without_access_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> list[str]:
        raise OSError(errno.ENOTSUP, "not supported")

    only_root(monkeypatch)
    let_write(folder / MANIFEST_NAME, 0o020)
    monkeypatch.setattr(os, "listxattr", refuse)
    load_all(folder)


def test_the_users_are_looked_up_once(
    build: SimpleNamespace, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many records there are: with a directory service it takes a while."""
    fake.entries = small(build)
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    releases.add_evidence(folder / "evidence", fake.entries)
    asked = only_root(monkeypatch)
    for path in (folder, *folder.rglob("*")):
        let_write(path, 0o020)
    load_all(folder)
    assert len(asked) == 1


# --- signatures ----------------------------------------------------------------------------------


@pytest.fixture
def own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "process", trust.Process())


@pytest.mark.usefixtures("own_policy")
def test_what_is_signed_may_be_writable_by_anyone(folder: Path) -> None:
    """The digests of the bytes that are used are compared with the signed ones."""
    releases.add_marker(folder)
    release = releases.sign(folder)
    for path in (folder, *folder.rglob("*"), release.envelope):
        let_write(path, 0o022)
    trust.require_signature(release.public_key, release.envelope)
    load_all(folder)


@pytest.mark.usefixtures("own_policy")
def test_trusted_local_evidence_is_not_signed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    (folder / "evidence").rename(own)
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(own))
    releases.add_marker(folder)
    release = releases.sign(folder)
    trust.require_signature(release.public_key, release.envelope, local_evidence=True)
    load_all(folder)
    let_write(next(own.glob("hash_router-*")), 0o002)
    with pytest.raises(ArtifactError, match=rf"evidence {own}/hash_router-.* every user may write"):
        list(store.read_evidence(folder).of(""))
    let_write(own, 0o002)
    with pytest.raises(ArtifactError, match=rf"evidence folder: .* to be able to write {own}, "):
        store.read_evidence(folder)


@pytest.mark.usefixtures("own_policy")
def test_a_key_that_others_may_write_is_refused(folder: Path, tmp_path: Path) -> None:
    releases.add_marker(folder)
    release = releases.sign(folder)
    key, link = tmp_path / "key.pem", tmp_path / "link.pem"
    key.write_bytes(releases.pem(releases.KEY))
    link.symlink_to(key)  # as a mounted secret is
    let_write(key, 0o002)
    for path in (key, link):
        with pytest.raises(TrustError, match=r"public key: .*every user may write") as raised:
            trust.require_signature(path, release.envelope)
    obey(raised.value)
    trust.require_signature(link, release.envelope)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "file", "directory"), [(0, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_a_record_is_written_for_its_owner(
    build: SimpleNamespace, tmp_path: Path, umask: int, file: int, directory: int
) -> None:
    """Whatever the umask is, so that it can be read again."""
    before = os.umask(umask)
    try:
        path = store.write_record(releases.record_of(build.small()[0]), tmp_path / "evidence")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == file
    assert stat.S_IMODE(path.parent.stat().st_mode) == directory
    assert store.load_evidence(path.parent).records


def test_a_folder_that_others_may_write_is_refused_before_the_suite_runs(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ArtifactError, match=f"chmod -R go-w {tmp_path}"):
        store.require_writable(tmp_path, tmp_path)


# --- stray files ---------------------------------------------------------------------------------


def test_a_stray_file_is_named_and_skipped(folder: Path) -> None:
    evidence = folder / "evidence"
    record = next(evidence.glob("topk_select-*"))
    strays = ["README.md", "notes.json", f"{record.stem}.bak", ".DS_Store", "old.json"]
    for name in strays[:-1]:
        (evidence / name).write_text("not a record")
    (evidence / "old.json").mkdir()
    let_write(evidence / "notes.json", 0o002)  # it is not read, so it does not matter
    load_all(folder)
    found = " ".join(
        CliRunner().invoke(main, ["doctor", "--artifacts", str(folder)]).output.split()
    )
    for name in strays:
        assert str(evidence / name) in found
    assert "not named as a record of evidence is, so not read: " in found
    assert "3 verified" in found
    (evidence / "one more").touch()
    assert " and 1 more" in CliRunner().invoke(main, ["doctor", "--artifacts", str(folder)]).output


def test_a_renamed_record_proves_nothing(folder: Path) -> None:
    evidence = folder / "evidence"
    record = next(evidence.glob("hash_router-*"))
    record.rename(evidence / "hash_router.json")
    kernels = kernels_on(0, folder)
    (entry,) = (each for each in kernels.manifest.entries if each.kernel == "hash_router")
    assert kernels.status(entry) == "unproven"
