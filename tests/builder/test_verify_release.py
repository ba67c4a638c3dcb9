"""``verify-release`` on a good release, and on releases that were tampered with in many ways."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence import emulation_record
from router_runtime.evidence import record as records
from router_runtime.evidence.emulation_record import EmulationRecord
from router_runtime.evidence.release import description, verify
from router_runtime.evidence.release_checks import sha256
from router_runtime.format import wheel
from router_runtime.format.manifest import dumps, loads
from router_runtime.format.provenance import (
    SUMS_NAME,
    Statement,
    statement_dumps,
    statement_loads,
    sums_dumps,
)
from tests.builder.conftest import Project, Released, run_installed, write_keys

#: The files beside a wheel start with the name of its folder and end with one of these.
WHEEL, PLAIN, ENVELOPE = "-py3-none-any.whl", ".provenance.json", ".dsse.json"
NOTES, BILL = ".notes.md", ".cdx.json"
INSIDE = "router_runtime/artifacts/"

Entries = dict[str, bytes]


@pytest.fixture
def folder(released: Released, tmp_path: Path) -> Path:
    """A copy of the release to tamper with."""
    return Path(shutil.copytree(released.folder, tmp_path / released.folder.name))


def _file(folder: Path, end: str) -> Path:
    """A file of a release: by how its name ends, or by its whole name."""
    return folder / (folder.name + end if end.startswith((".", "-")) else end)


def _refused(folder: Path, message: str, key: Path | None = None) -> None:
    with pytest.raises(RouterRuntimeError, match=message) as caught:
        verify([folder], key)
    assert re.search(r"[;\n] ?(do not install it|fetch|name|use)\b", str(caught.value))


def _flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _change(folder: Path, change: Callable[[Entries], object]) -> None:
    """Tamper with the wheel's entries and keep its form."""
    path = _file(folder, WHEEL)
    entries = wheel.read(path.read_bytes(), WHEEL)
    change(entries)
    path.write_bytes(wheel.write(entries))


def _forge(folder: Path, **changes: object) -> None:
    """Replace the statement by an unsigned one of the files in the folder, as an attacker without
    the key can.
    """
    _file(folder, ENVELOPE).unlink(missing_ok=True)
    statement = statement_loads(_file(folder, PLAIN).read_bytes())
    entries = wheel.read(_file(folder, WHEEL).read_bytes(), WHEEL)
    found = {p.name: sha256(p.read_bytes()) for p in folder.iterdir() if p.suffix != ".json"}
    found["manifest.json"] = sha256(entries[INSIDE + "manifest.json"])
    bill = _file(folder, BILL)
    found[bill.name] = sha256(bill.read_bytes())
    del found[SUMS_NAME]
    (folder / SUMS_NAME).write_bytes(sums_dumps(found))
    found[SUMS_NAME] = sha256((folder / SUMS_NAME).read_bytes())
    inside = {n.removeprefix(INSIDE): sha256(d) for n, d in entries.items() if INSIDE in n}
    subjects = found | inside
    forged = dataclasses.replace(statement, **{"subjects": subjects, **changes})  # type: ignore[arg-type]
    _file(folder, PLAIN).write_bytes(statement_dumps(forged))


def test_a_whole_release(released: Released) -> None:
    found = verify([released.folder], released.public)
    assert found.statement.commit == released.commit
    assert found.signed_by is not None
    assert found.missing == ()
    assert verify([released.folder], None).signed_by is None


def test_the_command(released: Released) -> None:
    project, folder = released.project, released.folder
    said = project.run("verify-release", folder, "--key", released.public)
    assert said.returncode == 0
    assert f"of commit {released.commit}, clean: 4 cubins for sm_90a, sm_100a" in said.stdout
    assert "\nsigned by " in said.stdout
    some = project.run("verify-release", _file(folder, WHEEL), _file(folder, ENVELOPE))
    assert some.returncode == 0
    assert "signature NOT CHECKED" in some.stdout
    assert f"not checked, for it was not given: {released.stem}.notes.md" in some.stdout
    alone = project.run("verify-release", folder, "--repository", project.root)
    assert alone.returncode == 1
    assert "expected --repository with --rebuild" in alone.stdout


def test_the_runtime_checks_a_release_without_the_builder(released: Released, site: Path) -> None:
    command = ("-m", "router_runtime", "verify-release")
    for files in ([released.folder], [_file(released.folder, WHEEL)]):
        said = run_installed(site, *command, *files, "--key", released.public)
        assert said.returncode == 0, said.stderr
        assert f"of commit {released.commit}, clean: 4 cubins for sm_90a, sm_100a" in said.stdout
        assert f"signed by the key {_fingerprint(released.public)}" in said.stdout
    assert "not checked, for it was not given: SHA256SUMS" in said.stdout
    assert run_installed(site, "-c", "import build_kernels").returncode == 1


def test_the_runtime_refuses_what_was_tampered_with(
    released: Released, site: Path, folder: Path
) -> None:
    _change(folder, _alter(".cubin"))
    command = ("-m", "router_runtime", "verify-release", folder, "--key", released.public)
    said = run_installed(site, *command)
    assert said.returncode == 1
    assert ".cubin: expected sha256" in said.stderr
    assert "do not install it, fetch it again" in said.stderr
    assert "Traceback" not in said.stderr


def _fingerprint(public: Path) -> str:
    """What openssl and sha256sum print for a key."""
    options = ["-pubin", "-in", str(public), "-outform", "DER"]
    der = subprocess.run(["openssl", "pkey", *options], check=True, capture_output=True).stdout
    return sha256(der)


def test_a_key_has_one_fingerprint(
    released: Released, site: Path, folder: Path, tmp_path: Path
) -> None:
    """Of the releaser's tool, both checks, the error about another key and a process's policy."""
    project, expected = released.project, _fingerprint(released.public)
    said = project.run("release", "--out", released.folder.parent, "--key", released.key)
    assert f"signing with the key {expected}\n" in said.stdout
    assert json.loads(_file(folder, ENVELOPE).read_bytes())["signatures"][0]["keyid"] == expected
    said = project.run("verify-release", folder, "--key", released.public)
    assert f"signed by the key {expected}\n" in said.stdout
    _, other = write_keys(tmp_path, "other")
    _refused(folder, f"signature by the key {_fingerprint(other)}, found.* name {expected}", other)
    script = (
        "from router_runtime.trust.policy import policy, require_signature\n"
        f"require_signature({str(released.public)!r}, {str(_file(folder, ENVELOPE))!r})\n"
        "print(policy())"
    )
    policy = run_installed(site, "-c", script)
    assert policy.stdout.endswith(f"by the key {expected}\n")


def test_a_wheel_named_alone_is_checked_with_what_lies_beside_it(
    released: Released, folder: Path
) -> None:
    (folder / "another.txt").write_text("what else lies there is left alone")
    found = verify([_file(folder, WHEEL)], released.public)
    assert found.signed_by == _fingerprint(released.public)
    assert found.missing == (SUMS_NAME, "manifest.json")
    _file(folder, ENVELOPE).unlink()
    with pytest.raises(
        RouterRuntimeError, match=r"found no .*\.dsse\.json among .*unsigned; fetch"
    ):
        verify([_file(folder, WHEEL)], released.public)


def test_what_a_signature_says_is_told(released: Released, folder: Path) -> None:
    def told() -> str:
        return "\n".join(description(verify([folder], None)))

    assert "signature NOT CHECKED: without --key" in told()
    _file(folder, ENVELOPE).unlink()
    assert "UNSIGNED" in told()


def test_sha256sum_reads_the_digests(released: Released, folder: Path) -> None:
    check = ["sha256sum", "--check", "--strict", SUMS_NAME]
    done = subprocess.run(check, cwd=folder, check=True, capture_output=True, text=True)
    named = {line.partition(":")[0] for line in done.stdout.splitlines()}
    # The statement has the digest of this list, and its own is what an envelope signs.
    others = {_file(folder, PLAIN).name, _file(folder, ENVELOPE).name, SUMS_NAME}
    assert named == {path.name for path in folder.iterdir()} - others
    _flip(_file(folder, WHEEL))
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 1


def test_digests_that_are_not_those_of_the_statement(folder: Path) -> None:
    """The statement is forged to fit a list of digests that does not fit the files."""
    _forge(folder)
    (folder / SUMS_NAME).write_text("0" * 64 + f"  {_file(folder, WHEEL).name}\n")
    digest = sha256((folder / SUMS_NAME).read_bytes())
    statement = statement_loads(_file(folder, PLAIN).read_bytes())
    _file(folder, PLAIN).write_bytes(
        statement_dumps(
            dataclasses.replace(statement, subjects={**statement.subjects, SUMS_NAME: digest})
        )
    )
    _refused(folder, "SHA256SUMS: expected the digests of the statement, found others")


def _first(entries: Entries, end: str) -> str:
    return next(name for name in sorted(entries) if name.endswith(end))


def _swap(entries: Entries) -> None:
    first, _, second, *_ = (name for name in sorted(entries) if name.endswith(".cubin"))
    entries[first], entries[second] = entries[second], entries[first]


def _alter(end: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        name = _first(entries, end)
        entries[name] = entries[name][:-5] + bytes([entries[name][-5] ^ 1]) + entries[name][-4:]

    return change


def _cut(end: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        name = _first(entries, end)
        entries[name] = entries[name][:-1]

    return change


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_alter(".cubin"), r"the wheel's scale-.*\.cubin: expected sha256 .*, found"),
        (_alter("manifest.json"), r"the wheel's manifest\.json: expected sha256"),
        (_alter(".release.json"), r"release\.json: expected sha256"),
        (_alter("gpu.json"), r"the wheel's evidence/.*json: expected sha256"),
        (_alter("errors.py"), r"py3-none-any\.whl: expected sha256"),
        (_cut(".cubin"), r"\.cubin: expected sha256"),
        (_cut("gpu.json"), r"evidence/.*: expected sha256"),
        (_swap, r"scale-any-sm_100a-.*\.cubin: expected sha256(.|\n)*-sm_90a-.*: expected sha256"),
        (lambda e: e.pop(_first(e, ".cubin")), r"\.cubin: expected a file, found none"),
        (lambda e: e.pop(_first(e, "gpu.json")), r"evidence/.*: expected a file, found none"),
        (lambda e: e.pop(_first(e, "manifest.json")), r"manifest\.json: expected a file"),
        (lambda e: e.update({INSIDE + "more.cubin": b"x"}), r"not in the statement"),
        (
            lambda e: e.update({INSIDE + "evidence/more.json": b"{}"}),
            r"not in the statement",
        ),
    ],
)
def test_a_tampered_wheel(
    released: Released, folder: Path, signed: bool, change: Callable[[Entries], None], message: str
) -> None:
    _change(folder, change)
    _refused(folder, message, released.public if signed else None)


@pytest.mark.parametrize("name", [WHEEL, PLAIN, ENVELOPE, "manifest.json", BILL, SUMS_NAME])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "empty"])
def test_a_damaged_file(released: Released, folder: Path, name: str, damage: str) -> None:
    path = _file(folder, name)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        _flip(path, {"first": 0, "middle": len(data) // 2, "last": -1}[damage])
    _refused(folder, "expected", released.public)
    # In an unsigned statement only contradictions to the other files can be found.
    if name not in (ENVELOPE, PLAIN):
        _file(folder, ENVELOPE).unlink()
        _refused(folder, "expected", None)


def test_a_signature_is_checked_to_its_last_bit(released: Released, folder: Path) -> None:
    path = _file(folder, ENVELOPE)
    document = json.loads(path.read_bytes())
    signature = bytearray(base64.b64decode(document["signatures"][0]["sig"]))
    signature[40] ^= 1
    document["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    path.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
    _refused(
        folder, "expected a signature by the key .*, found none that is valid", released.public
    )


def test_another_key(released: Released, folder: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    _refused(folder, "it was signed with another key or altered", other)
    text = tmp_path / "text.pub"
    text.write_text("no key")
    _refused(folder, "expected an ed25519 public key in PEM", text)
    _refused(folder, "expected an ed25519 public key in PEM", released.key)
    _refused(folder, "public key: expected a readable", tmp_path / "absent.pub")


def test_another_keys_name_on_a_signature(released: Released, folder: Path, tmp_path: Path) -> None:
    """Signed with another key, under the releaser's key id."""
    from build_kernels.release import signing

    key, _ = write_keys(tmp_path, "other")
    mine = json.loads(signing.sign(b"{}", signing.private_key(key, folder, str)))
    claimed = json.loads(_file(folder, ENVELOPE).read_bytes())["signatures"][0]["keyid"]
    mine["signatures"][0]["keyid"] = claimed
    _file(folder, ENVELOPE).write_text(json.dumps(mine, sort_keys=True, indent=1) + "\n")
    _refused(folder, "found none that is valid", released.public)


def test_an_unsigned_release_where_a_key_is_demanded(released: Released, folder: Path) -> None:
    _file(folder, ENVELOPE).unlink()
    verify([folder], None)
    _refused(folder, "it is unsigned", released.public)


def test_an_envelope_of_another_type(released: Released, folder: Path) -> None:
    document = json.loads(_file(folder, ENVELOPE).read_bytes())
    for change in ({"payloadType": "text/plain"}, {"more": 1}):
        _file(folder, ENVELOPE).write_text(
            json.dumps(document | change, sort_keys=True, indent=1) + "\n"
        )
        _refused(folder, "expected a (DSSE envelope of|signature)", released.public)


def test_an_envelope_under_another_name(released: Released, folder: Path) -> None:
    _file(folder, ENVELOPE).rename(folder / "dsv4_router_runtime-0.2.0.dsse.json")
    name = re.escape(released.stem + ENVELOPE)
    _refused(folder, f"expected the envelope {name}", released.public)


@pytest.fixture(scope="module")
def older(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of an earlier commit, signed with the same key."""
    root = tmp_path_factory.mktemp("older") / "project"
    project = Project(Path(shutil.copytree(released.project.root, root)))
    source = project.kernel_file("scale/scale.cu")
    source.write_text(source.read_text().replace("* factor()", "* factor() * __sinf(x[i])"))
    project.build("--update-lock")
    project.commit()
    return project.release("--out", root.parent / "dist", "--key", released.key)


def test_pip_replaces_a_release_by_one_of_another_commit(
    released: Released, older: Path, tmp_path: Path
) -> None:
    """The sources' version is the same; what is installed is what was asked for last."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = str(place / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    version = [python, "-P", "-c", "import router_runtime as r; print(r.__version__)"]
    for folder in (older, released.folder, older):
        command = [*pip, "install", "--no-deps", "--no-index", str(_file(folder, WHEEL))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "already" not in said
        found = subprocess.run(version, check=True, capture_output=True, text=True).stdout
        assert folder.name == f"dsv4_router_runtime-{found.strip()}"


def test_every_tool_tells_the_same_version(released: Released, site: Path) -> None:
    told = [
        run_installed(site, "-m", "router_runtime", "--version").stdout.split()[1],
        json.loads(run_installed(site, "-m", "router_runtime", "doctor", "--json").stdout)[
            "software"
        ]["router_runtime"],
        run_installed(
            site, "-c", "import importlib.metadata as m; print(m.version('dsv4-router-runtime'))"
        ).stdout.strip(),
        statement_loads(_file(released.folder, PLAIN).read_bytes()).version,
    ]
    assert told == [released.stem.partition("-")[2]] * 4


def test_an_older_statement_over_a_newer_wheel(
    released: Released, older: Path, folder: Path
) -> None:
    for end in (ENVELOPE, PLAIN, NOTES, BILL, "manifest.json", SUMS_NAME):
        shutil.copy(_file(older, end), _file(folder, end))
    _refused(folder, "whl: expected no such file, found one not in the stat", released.public)
    _refused(folder, f"the wheel's name: expected {re.escape(older.name)}", released.public)


def test_an_older_wheel_with_newer_cubins(released: Released, older: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(older, tmp_path / older.name))
    newer = wheel.read(_file(released.folder, WHEEL).read_bytes(), WHEEL)

    def replay(entries: Entries) -> None:
        for name in [n for n in entries if n.endswith(".cubin")]:
            new = next((n for n in newer if n[:-22] == name[:-22]), name)
            entries[name] = newer[new]

    _change(mixed, replay)
    _refused(mixed, r"the wheel's scale-any-sm_90a.*\.cubin: expected sha256", released.public)


def test_an_older_manifest_in_a_newer_wheel(released: Released, older: Path, folder: Path) -> None:
    old = wheel.read(_file(older, WHEEL).read_bytes(), WHEEL)[INSIDE + "manifest.json"]
    _change(folder, lambda entries: entries.update({INSIDE + "manifest.json": old}))
    _refused(folder, r"the wheel's manifest\.json: expected sha256", released.public)


def _manifest_of_other_version(entries: Entries) -> None:
    document = json.loads(entries[INSIDE + "manifest.json"])
    document["format_version"] = 99
    entries[INSIDE + "manifest.json"] = json.dumps(document).encode()


def _manifest_with_swapped_files(entries: Entries) -> None:
    document = json.loads(entries[INSIDE + "manifest.json"])
    one, two = document["entries"][:2]
    for fact in ("file", "sha256", "size"):
        one[fact], two[fact] = two[fact], one[fact]
    text = json.dumps(document, sort_keys=True, indent=1) + "\n"
    entries[INSIDE + "manifest.json"] = text.encode()


def _cubin_for_another_target(entries: Entries) -> None:
    """A Hopper cubin under a Blackwell entry, with matching digests."""
    manifest = loads(entries[INSIDE + "manifest.json"])
    one, other, two, *rest = manifest.entries
    assert (one.target, two.target) == ("sm_100a", "sm_90a")
    data = entries[INSIDE + two.file]
    name = one.file.replace(one.sha256[:16], two.sha256[:16])
    wrong = dataclasses.replace(one, file=name, sha256=two.sha256, size=len(data))
    del entries[INSIDE + one.file]
    entries[INSIDE + name] = data
    changed = dataclasses.replace(manifest, entries=(wrong, other, two, *rest))
    entries[INSIDE + "manifest.json"] = dumps(changed)


def _another_toolchain(entries: Entries) -> None:
    manifest = loads(entries[INSIDE + "manifest.json"])
    tools = dataclasses.replace(manifest.toolchain, packages={"gcc": "1"}, flags={})
    changed = dataclasses.replace(manifest, toolchain=tools)
    entries[INSIDE + "manifest.json"] = dumps(changed)


def _replaced(end: str, old: bytes, new: bytes) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        name = _first(entries, end)
        entries[name] = entries[name].replace(old, new)

    return change


def _foreign_evidence(entries: Entries) -> None:
    """A record of some other cubin, under its right name."""
    name = _first(entries, "gpu.json")
    record = records.loads(entries.pop(name))
    foreign = dataclasses.replace(
        record,
        sha256="1" * 64,
        source_sha256="2" * 64,
        file=record.file.replace(record.sha256[:16], "1" * 16),
    )
    entries[f"{INSIDE}evidence/{foreign.file_name}"] = records.dumps(foreign)


def _emulation(entries: Entries, sha256: str | None = None) -> EmulationRecord:
    """A record of emulation of an entry for sm_100a, of another suite than this process has; with
    ``sha256``, of another cubin of its sources.
    """
    manifest = loads(entries[f"{INSIDE}manifest.json"])
    entry = next(each for each in manifest.entries if each.target == "sm_100a")
    record = records.loads(entries[_first(entries, "gpu.json")])
    shared = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    del shared["format_version"]
    shared |= {"entry": entry.key, "target": entry.target, "sha256": sha256 or entry.sha256}
    shared["file"] = entry.file.replace(entry.sha256[:16], (sha256 or entry.sha256)[:16])
    shared |= {"ptxas": "13.5.37", "ran_target": "sm_90a", "modes": emulation_record.MODES}
    shared |= dict.fromkeys(("ptx_sha256", "model_sha256", "ran_sha256"), "3" * 64)
    return EmulationRecord(**shared)


def _foreign_emulation(entries: Entries) -> None:
    foreign = _emulation(entries, "1" * 64)
    entries[f"{INSIDE}evidence/{foreign.file_name}"] = emulation_record.dumps(foreign)


def _emulation_under_the_other_name(entries: Entries) -> None:
    record = _emulation(entries)
    entries[f"{INSIDE}evidence/{record.stem}.json"] = emulation_record.dumps(record)


def _evidence_renamed(entries: Entries) -> None:
    names = [name for name in sorted(entries) if "/evidence/" in name]
    entries[names[0]], entries[names[1]] = entries[names[1]], entries[names[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_manifest_of_other_version, "expected manifest format version 1, found 99"),
        (
            _manifest_with_swapped_files,
            r"scale/any/sm_100a/one: expected the file scale-any-sm_100a",
        ),
        (_cubin_for_another_target, "expected scale for sm_100a, found scale for sm_90a"),
        (_another_toolchain, "expected the statement's toolchain, found another"),
        (_another_toolchain, "expected the statement's flags, found others"),
        (_another_toolchain, r"release\.json: manifest: expected"),
        (_alter(".cubin"), "expected .* bytes with sha256"),
        (_replaced("gpu.json", b'"rows"', b'"rowz"'), r"evidence/.*: .*expected exactly the keys"),
        (_replaced("gpu.json", b'"seed": ', b'"seed": true, "x": '), r"evidence/.*: .*expected"),
        (_foreign_evidence, r"evidence/.*: expected a record about a cubin of this release"),
        (_foreign_emulation, r"emulated.json: expected a record about a cubin of this release"),
        (_emulation_under_the_other_name, r"evidence/.*: expected evidence of format version 2"),
        (_evidence_renamed, "expected the name"),
        (
            _replaced("METADATA", b"\nVersion: 0.1.0", b"\nVersion: 0.2.0"),
            "found dsv4-router-runtime 0\\.2\\.0",
        ),
        (
            _replaced("METADATA", b"\nName: dsv4", b"\nName: other"),
            "found other-router-runtime 0",
        ),
        (lambda e: e.pop(_first(e, ".release.json")), r"release\.json: expected"),
        (lambda e: e.update({INSIDE + "x.cubin": b"x"}), "expected only cubins that the manifest"),
        (lambda e: e.pop(_first(e, ".cubin")), "in the wheel, found none"),
    ],
)
def test_a_wheel_that_contradicts_itself(
    folder: Path, change: Callable[[Entries], None], message: str
) -> None:
    """The statement is forged to fit the files; they still do not fit each other."""
    _change(folder, change)
    entries = wheel.read(_file(folder, WHEEL).read_bytes(), WHEEL)
    (folder / "manifest.json").write_bytes(entries[INSIDE + "manifest.json"])
    _forge(folder)
    _refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": "0.2.0"},
            r"the wheel's name: expected dsv4_router_runtime-0\.2\.0, found dsv4_router_runtime-",
        ),
        (
            {"version": "0.1.0"},
            r"the version: expected it to end with \+g[0-9a-f]{12}, found 0\.1\.0",
        ),
        ({"distribution": "other"}, "the wheel's metadata: expected other 0"),
        ({"commit": "0" * 40}, "commit: expected 0000"),
        ({"commit": "0" * 40}, r"the version: expected it to end with \+g000000000000"),
        ({"changes": ("changed x",)}, "clean: expected False, found True"),
        ({"changes": ("changed x",)}, r"the version: .*\.dirty and a digest of its changes"),
        ({"targets": ("sm_90a",)}, r"expected entries for \('sm_90a',\), found \['sm_100a'\]"),
        ({"subjects": {}}, "not in the statement"),
    ],
)
def test_a_statement_about_another_release(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    _forge(folder, **changes)
    _refused(folder, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("/provenance/v1", "/provenance/v2"),
        lambda text: text.replace('"name": "source"', '"name": "sources"'),
        lambda text: text.replace('"_type"', '"type"'),
        lambda text: text.replace('"clean": true', '"clean": false'),
        lambda text: text[:-1],
        lambda text: "[]",
        lambda text: "[" * 100_000,
    ],
)
def test_a_statement_of_another_shape(folder: Path, change: Callable[[str], str]) -> None:
    _file(folder, ENVELOPE).unlink()
    _file(folder, PLAIN).write_text(change(_file(folder, PLAIN).read_text()))
    _refused(folder, "expected a provenance statement")


def _written(data: bytes, change: Callable[[zipfile.ZipInfo], None]) -> bytes:
    """The wheel written again with one entry's header changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("/errors.py"):
                change(info)
            new.writestr(info, content, compress_type=info.compress_type)
    return buffer.getvalue()


def _set(name: str, value: object) -> Callable[[zipfile.ZipInfo], None]:
    return lambda info: setattr(info, name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("filename", "../errors.py"), r"expected plain paths .*, found '\.\./errors\.py'"),
        (_set("filename", "router_runtime/../../errors.py"), "expected plain paths"),
        (_set("filename", "/etc/errors.py"), "expected plain paths"),
        (_set("filename", "router_runtime\\errors.py"), "expected plain paths"),
        (_set("filename", "router_runtime//errors.py"), "expected plain paths"),
        (_set("filename", "router_runtime/__init__.py"), "expected each entry once"),
        (_set("external_attr", 0o120777 << 16), "found a symbolic link"),
        (_set("external_attr", 0o100755 << 16), "found another kind or mode"),
        (_set("external_attr", 0o040755 << 16), "found another kind or mode"),
        (_set("compress_type", zipfile.ZIP_DEFLATED), "found a compressed entry"),
        (_set("date_time", (2026, 1, 1, 0, 0, 0)), "expected the form that a release has"),
        (_set("extra", b"\x99\x99\x01\x00x"), "expected the form that a release has"),
        (_set("comment", b"x"), "expected the form that a release has"),
        (_set("filename", "router_runtime/zzz.py"), "expected the form that a release has"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_no_release(
    folder: Path, change: Callable[[zipfile.ZipInfo], None], message: str
) -> None:
    path = _file(folder, WHEEL)
    path.write_bytes(_written(path.read_bytes(), change))
    _refused(folder, message)


def _encrypted(data: bytes) -> bytes:
    """The archive whose list of entries says that the first is encrypted."""
    flags = data.index(b"PK\x01\x02") + 8
    return data[:flags] + b"\x01" + data[flags + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"#!/bin/sh\n" + data,
        lambda data: data + b"x",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"router_runtime/errors.py", b"router_runtime/error_.py", 1),
        lambda data: b"PK",
        lambda data: _encrypted(data),
    ],
)
def test_bytes_around_and_inside_the_archive(
    folder: Path, change: Callable[[bytes], bytes]
) -> None:
    path = _file(folder, WHEEL)
    path.write_bytes(change(path.read_bytes()))
    _refused(folder, "expected (the form that a release has|a whole wheel)")


@pytest.mark.parametrize("name", [WHEEL, ENVELOPE, "manifest.json"])
def test_links_among_the_files(released: Released, folder: Path, name: str) -> None:
    _file(folder, name).unlink()
    _file(folder, name).symlink_to(_file(released.folder, name))
    _refused(folder, "found a symbolic link", released.public)


def test_files_that_do_not_belong_together(
    released: Released, folder: Path, tmp_path: Path
) -> None:
    (folder / "more.txt").write_text("mine")
    _refused(folder, r"more\.txt: expected no such file, found one not in the statement")
    (folder / "more.txt").unlink()
    shutil.copy(_file(folder, WHEEL), folder / "dsv4_router_runtime-0.2.0-py3-none-any.whl")
    _refused(folder, "expected one wheel of a release among the files, found 2")
    with pytest.raises(RouterRuntimeError, match="found two called"):
        verify([_file(folder, WHEEL), _file(released.folder, WHEEL)], None)
    alone = tmp_path / "alone" / _file(folder, WHEEL).name
    alone.parent.mkdir()
    shutil.copy(_file(folder, WHEEL), alone)
    with pytest.raises(RouterRuntimeError, match=r"expected .* beside the wheel, found neither"):
        verify([alone], None)
    with pytest.raises(RouterRuntimeError, match="found 0"):
        verify([folder / "manifest.json"], None)
    os.mkfifo(folder / "pipe")
    _refused(folder, "expected a plain file .*pipe, found something else")
    with pytest.raises(RouterRuntimeError, match=r"found a folder; name the folder of one release"):
        verify([tmp_path], None)


@pytest.mark.parametrize("umask", [0o077, 0])
def test_a_rebuild_gives_the_same_bytes(released: Released, umask: int) -> None:
    """With any umask, though it would decide who may write the clone's evidence."""
    project = released.project
    arguments = (released.folder, "--key", released.public, "--rebuild")
    said = project.run("verify-release", *arguments, env={"PYTHONHASHSEED": "1"}, umask=umask)
    assert said.returncode == 0, said.stdout
    assert "the commit gives the same bytes again" in said.stdout


# A release of changed sources that claims to be the clean commit: only that is false.
LIAR = """
from build_kernels.release import checkout
from build_kernels.release import release
from build_kernels.cli import main

truth = checkout.source
checkout.source = lambda root: checkout.Source(truth(root).commit, ())
release.requirements.check_lock = lambda artifacts, jobs: None
release.compare_with_lock = lambda root, manifest, own: None
main(["release", "--out", {out!r}, "--target", "sm_90a"])
"""


def test_a_rebuild_names_what_differs(committed: Project, tmp_path: Path) -> None:
    source = committed.kernel_file("scale/scale.cu")
    source.write_text(source.read_text().replace("* factor()", "* factor() * __sinf(x[i])"))
    out = tmp_path / "out"
    result = committed.python(LIAR.format(out=str(out)))
    assert result.returncode == 0, result.stderr
    (folder,) = out.iterdir()
    assert committed.run("verify-release", folder).returncode == 0
    committed.git("checkout", "--quiet", ".")
    said = committed.run("verify-release", folder, "--rebuild").stdout
    assert "to give the same bytes again, found:" in said
    assert "changed   scale/any/sm_90a/one" in said
    for pattern in (
        r"bytes: [0-9a-f]{16} -> [0-9a-f]{16}",
        r"source: [0-9a-f]{16} -> [0-9a-f]{16}",
        r"registers: \d+ -> \d+",
        r"instructions: .*MUFU\.SIN 1 -> 0",
        r"first other instruction, at 0x[0-9a-f]+: .* -> ",
        r"whl: [0-9a-f]{64} -> [0-9a-f]{64}",
        r"the wheel's router_runtime/artifacts/manifest\.json: ",
    ):
        assert re.search(pattern, said), pattern


def test_a_rebuild_of_an_unknown_commit(released: Released, folder: Path) -> None:
    unknown = released.commit[:12] + "0" * 28  # the version names the first 12 digits

    def marker(entries: Entries) -> None:
        name = INSIDE + f"{released.stem}.release.json"
        entries[name] = entries[name].replace(released.commit.encode(), unknown.encode())

    _change(folder, marker)
    _forge(folder, commit=unknown)
    said = released.project.run("verify-release", folder, "--rebuild")
    assert said.returncode == 1
    assert f"expected the commit {unknown}" in said.stdout
    assert "--repository" in said.stdout


def test_every_field_of_a_statement_survives(released: Released) -> None:
    data = _file(released.folder, PLAIN).read_bytes()
    statement = statement_loads(data)
    assert isinstance(statement, Statement)
    assert statement_dumps(statement) == data
