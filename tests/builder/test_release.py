"""Releases as a releaser makes them: what they hold, the same bytes anywhere, what is refused."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from build_kernels import publish
from build_kernels.catalog.targets import DEFAULT_TARGETS
from build_kernels.compile import toolchain
from build_kernels.errors import BuildError
from build_kernels.release import changelog, contents, notes, wheel
from router_runtime.evidence.store import Evidence, load_evidence
from router_runtime.evidence.suite import cases_sha256
from router_runtime.format.manifest import Manifest, loads
from router_runtime.format.provenance import marker_loads, statement_loads
from router_runtime.format.wheel import read
from router_runtime.trust import dsse
from router_runtime.version import __version__
from tests.builder.conftest import (
    EMULATION,
    MODEL,
    RELEASED_KEYS,
    ROOT,
    Project,
    Released,
    pip_install,
    snapshot,
    write_keys,
)

NAME = "dsv4_router_runtime"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _wheel(folder: Path) -> dict[str, bytes]:
    (path,) = folder.glob("*.whl")
    return read(path.read_bytes(), path.name)


def _refused(project: Project, message: str, *arguments: str | Path, **settings: object) -> str:
    """Run a release that has to fail with this message and leave no files; return its output."""
    out = project.root.parent / "refused"
    arguments = ("--out", out, "--jobs", "1", *arguments)
    result = project.run("release", *arguments, **settings)  # type: ignore[arg-type]
    assert result.returncode == 1, result.stdout
    assert message in result.stdout
    assert "next: " in result.stdout
    assert "Traceback" not in result.stdout
    assert not out.exists()
    return result.stdout


def test_what_a_release_holds(released: Released) -> None:
    folder = released.folder
    start = f"{NAME}-{__version__}+g{released.commit[:12]}"
    assert folder.name == released.stem == start
    names = {
        f"{start}-py3-none-any.whl",
        f"{start}.provenance.json",
        f"{start}.dsse.json",
        f"{start}.cdx.json",
        f"{start}.notes.md",
        "manifest.json",
        "SHA256SUMS",
    }
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_the_wheel_holds(released: Released) -> None:
    entries = _wheel(released.folder)
    metadata = f"{released.stem}.dist-info"
    sources = released.project.root / "router_runtime"
    expected = {
        path.relative_to(released.project.root).as_posix()
        for path in sources.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    manifest = loads(entries["router_runtime/artifacts/manifest.json"])
    artifacts = {
        "manifest.json",
        f"{released.stem}.release.json",
        *(e.file for e in manifest.entries),
    }
    evidence = released.project.artifacts / "evidence"
    artifacts |= {f"evidence/{path.name}" for path in evidence.iterdir()}
    expected |= {f"router_runtime/artifacts/{name}" for name in artifacts}
    expected |= {
        f"{metadata}/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "sboms/sbom.cdx.json")
    }
    expected |= {f"{metadata}/licenses/{name}" for name in ("LICENSE", "NOTICE")}
    assert entries.keys() == expected
    assert tuple(entry.key for entry in manifest.entries) == RELEASED_KEYS
    assert entries[f"{metadata}/entry_points.txt"].decode().split() == [
        *("[console_scripts]", "router-runtime", "=", "router_runtime.cli.main:main"),
        *("[sglang.srt.plugins]", "dsv4_router", "="),
        "router_runtime.integrations.sglang.plugin:register",
        *("[vllm.general_plugins]", "dsv4_router", "="),
        "router_runtime.integrations.vllm.plugin:register",
    ]
    assert b"Tag: py3-none-any\n" in entries[f"{metadata}/WHEEL"]
    assert b"\nName: dsv4-router-runtime\n" in entries[f"{metadata}/METADATA"]
    with zipfile.ZipFile(next(released.folder.glob("*.whl"))) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist()[-1].endswith("/RECORD")


def test_an_installer_takes_the_wheel_and_the_runtime_finds_its_artifacts(
    released: Released, tmp_path: Path
) -> None:
    (path,) = released.folder.glob("*.whl")
    site = tmp_path / "site"
    assert pip_install(path, site).returncode == 0
    found = subprocess.run(
        [
            *(sys.executable, "-P", "-c"),
            "from router_runtime.device import artifact_store as a; folder = a.find_artifacts();"
            "m = a.read_manifest(folder); print(folder, len(m.entries));"
            "[a.read_cubin(entry, folder) for entry in m.entries]",
        ],
        env={"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [
        str(site / "router_runtime" / "artifacts"),
        str(len(RELEASED_KEYS)),
    ]


def test_the_marker_and_the_statement(released: Released) -> None:
    entries = _wheel(released.folder)
    marker = marker_loads(entries[f"router_runtime/artifacts/{released.stem}.release.json"])
    manifest = entries["router_runtime/artifacts/manifest.json"]
    statement = statement_loads((released.folder / f"{released.stem}.provenance.json").read_bytes())
    for described in (marker, statement):
        assert described.commit == released.commit
        assert described.clean
        assert described.targets == ("sm_90a", "sm_100a")
        assert described.distribution == "dsv4-router-runtime"
        assert described.version == released.stem.partition("-")[2]
    assert marker.manifest_sha256 == _sha256(manifest)
    prefix = "router_runtime/artifacts/"
    subjects = {n.removeprefix(prefix): _sha256(d) for n, d in entries.items() if prefix in n}
    for path in released.folder.iterdir():
        if not path.name.endswith((".provenance.json", ".dsse.json")):
            subjects[path.name] = _sha256(path.read_bytes())
    assert statement.subjects == subjects
    built = loads(manifest)
    assert statement.flags == built.toolchain.flags
    assert {name: p.version for name, p in statement.packages.items()} == built.toolchain.packages
    lock = toolchain.LOCK.read_text()
    assert all(package.sha256 for package in statement.packages.values())
    digests = {digest for package in statement.packages.values() for digest in package.sha256}
    assert sorted(digests) == sorted(
        {word.split(":")[1] for word in lock.split() if word.startswith("--hash=sha256:")}
    )
    assert statement.locks == {
        f"build_kernels/{path.name}": _sha256(path.read_bytes())
        for path in (toolchain.LOCK, toolchain.RELEASE_LOCK)
    }


def test_the_bill_of_materials(released: Released) -> None:
    data = (released.folder / f"{released.stem}.cdx.json").read_bytes()
    assert _wheel(released.folder)[f"{released.stem}.dist-info/sboms/sbom.cdx.json"] == data
    document = json.loads(data)
    assert document["bomFormat"] == "CycloneDX"
    assert "serialNumber" not in document
    assert set(document["metadata"]) == {"component"}
    components = {item["bom-ref"]: item for item in document["components"]}
    manifest = loads((released.folder / "manifest.json").read_bytes())
    for entry in manifest.entries:
        assert components[entry.file]["hashes"] == [{"alg": "SHA-256", "content": entry.sha256}]
    for name, version in manifest.toolchain.packages.items():
        assert components[f"toolchain/{name}"]["purl"] == f"pkg:pypi/{name}@{version}"
        assert components[f"toolchain/{name}"]["scope"] == "excluded"
    needed = {name for name in components if name.startswith("runtime/")}
    assert needed == {"runtime/click", "runtime/cuda-bindings", "runtime/torch"}


def test_the_notes_have_each_status(released: Released) -> None:
    lines = (released.folder / f"{released.stem}.notes.md").read_text().splitlines()
    assert "| sm_90a | 2 | 0 | 0 | 0 |" in lines
    assert "| sm_100a | 0 | 2 | 0 | 0 |" in lines
    manifest = loads((released.folder / "manifest.json").read_bytes())
    for entry in manifest.entries:
        status = "verified" if entry.target == "sm_90a" else "source-verified"
        (line,) = (line for line in lines if line.startswith(f"| {entry.key} |"))
        assert line.split(" | ")[1:4] == [
            status,
            "Example GPU (9.0)",
            str(entry.resources.registers),
        ]
        assert f"`{entry.sha256[:16]}`" in line


def test_the_notes_say_how_to_install_and_what_changed(released: Released) -> None:
    text = (released.folder / f"{released.stem}.notes.md").read_text()
    name = f"{released.stem}-py3-none-any.whl"
    commands = re.findall(r"```\n(.*?)```", text, re.DOTALL)[0].splitlines()
    assert commands == [
        "sha256sum --check SHA256SUMS",
        "router-runtime verify-release . --key KEY.pub",
        f"pip install './{name}[signature]'",
        "router-runtime doctor",
    ]
    assert f"`{_sha256((released.folder / name).read_bytes())}`" in text
    assert "| torch | >=2.9,<3; the tests run with 2.9.0 and 2.15.0 |" in text
    assert "| NVIDIA driver, to use a GPU | release 580 (CUDA 13.0) or newer |" in text
    changes = text.partition("## What changed since the last release\n")[2]
    assert changelog.section((ROOT / "CHANGELOG.md").read_text(), __version__) in changes


def test_a_changelogs_sections() -> None:
    text = "# Changelog\n\n## Unreleased\n\n- New.\n\n## 1.2.0 (in May)\n\n### Fixed\n\n- B.\n"
    assert changelog.section(text, "1.3.0") == "- New."
    assert changelog.section(text, "1.2.0") == "### Fixed\n\n- B."
    for wrong in ("", "## 1.3.0\n\n## 1.2.0\n- B.\n"):
        with pytest.raises(BuildError, match=r"expected a section '## 1\.3\.0' or '## Unrel"):
            changelog.section(wrong, "1.3.0")


def test_the_notes_say_which_member_of_a_family_recorded(released: Released) -> None:
    """A record of one member makes the digest verified; the column names the member."""
    manifest = loads((released.folder / "manifest.json").read_bytes())
    entry = dataclasses.replace(manifest.entries[0], target="sm_100f")
    entries = _wheel(released.folder)
    marker = marker_loads(entries[f"router_runtime/artifacts/{released.stem}.release.json"])
    evidence = load_evidence(released.project.artifacts / "evidence")
    record = dataclasses.replace(
        evidence.records[0],
        target="sm_100f",
        constants=entry.constants,
        sha256=entry.sha256,
        device="Example B300",
        compute_capability=(10, 3),
        cases_sha256=cases_sha256(entry.kernel),
    )
    manifest = dataclasses.replace(manifest, entries=(entry,))
    marker = dataclasses.replace(marker, targets=("sm_100f",))
    lines = notes.text(marker, manifest, Evidence((record,)), "").splitlines()
    assert "| sm_100f | 1 | 0 | 0 | 0 |" in lines
    (line,) = (line for line in lines if line.startswith(f"| {entry.key} |"))
    assert line.split(" | ")[1:3] == ["verified", "Example B300 (10.3)"]
    notes.require_verified("sm_100f", manifest, Evidence((record,)))
    stale = dataclasses.replace(record, cases_sha256="7" * 64)
    with pytest.raises(BuildError, match="unproven; the evidence of Example B300 is of another"):
        notes.require_verified("sm_100f", manifest, Evidence((stale,)))


@pytest.mark.usefixtures("compilers")
def test_the_same_bytes_in_another_folder_and_another_environment(
    released: Released, committed: Project, tmp_path: Path
) -> None:
    elsewhere = Project(committed.root.rename(tmp_path / "A longer path, and spaces"))
    hostile = {
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "Pacific/Chatham",
        "PYTHONHASHSEED": "4711",
        "SOURCE_DATE_EPOCH": "1700000000",
        "HATCH_BUILD_NO_HOOKS": "1",
        "HOME": str(tmp_path),
        "GIT_DIR": "/nonexistent",
    }
    arguments = ("--out", tmp_path / "out", "--key", released.key, "--jobs", "2")
    again = elsewhere.release(*arguments, env=hostile, umask=0o077)
    assert snapshot(again) == snapshot(released.folder)


def test_nothing_names_where_or_when_it_was_made(released: Released) -> None:
    contents = {path.name: path.read_bytes() for path in released.folder.iterdir()}
    for name, data in {**contents, **_wheel(released.folder)}.items():
        for word in (str(released.folder), str(released.project.root), sys.prefix, "/tmp/"):
            assert word.encode() not in data, (name, word)


def test_releases_of_some_targets_are_distributions_of_their_own(
    committed: Project, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = committed.release("--out", out, "--target", "sm_90a")
    version = f"{__version__}+g{committed.git('rev-parse', 'HEAD')[:12]}"
    assert folder.name == f"{NAME}_sm90a-{version}"
    entries = _wheel(folder)
    manifest = loads(entries["router_runtime/artifacts/manifest.json"])
    assert {entry.target for entry in manifest.entries} == {"sm_90a"}
    assert (
        b"\nName: dsv4-router-runtime-sm90a\n"
        in entries[f"{NAME}_sm90a-{version}.dist-info/METADATA"]
    )
    # The markers have names of their own, so that a runtime sees two releases in one folder.
    other = _wheel(committed.release("--out", out, "--target", "sm_100f", "--target", "sm_90a"))
    markers = [{n for n in found if n.endswith(".release.json")} for found in (entries, other)]
    assert markers == [
        {f"router_runtime/artifacts/{NAME}_sm90a-{version}.release.json"},
        {f"router_runtime/artifacts/{NAME}_sm90a_sm100f-{version}.release.json"},
    ]
    assert len(list(out.iterdir())) == 2
    # Only records that count for an entry travel.
    assert sum("artifacts/evidence/" in name for name in entries) == 2


def test_a_source_verified_wheel_carries_the_evidence_of_its_twin(
    committed: Project, tmp_path: Path
) -> None:
    folder = committed.release("--out", tmp_path / "out", "--target", "sm_100a")
    evidence = [name for name in _wheel(folder) if "artifacts/evidence/" in name]
    assert len(evidence) == 2
    assert all("-sm_90a-" in name for name in evidence)


@pytest.mark.parametrize(
    "change", ["altered", "hidden", "removed", "untracked", "ignored", "executable"]
)
def test_a_checkout_with_changes_is_refused(committed: Project, change: str) -> None:
    source = committed.root / "router_runtime" / "cli" / "doctor.py"
    kind = "changed"
    if change in ("altered", "hidden"):
        if change == "hidden":
            committed.git("update-index", "--assume-unchanged", "router_runtime/cli/doctor.py")
        source.write_text(source.read_text() + "# mine\n")
        if change == "hidden":
            assert committed.git("status", "--porcelain") == ""
    elif change == "removed":
        source.unlink()
        kind = "removed"
    elif change == "executable":
        source.chmod(0o755)
    else:
        source = source.with_name("mine.py")
        source.write_text("")
        kind = "untracked"
        if change == "ignored":
            (committed.root / ".git" / "info").mkdir(exist_ok=True)
            (committed.root / ".git" / "info" / "exclude").write_text("mine.py\n")
    said = _refused(committed, "expected a checkout without changes")
    assert f"\n  {kind} router_runtime/cli/{source.name}\n" in said
    assert "--allow-dirty" in said


def test_changes_that_are_allowed_are_recorded(committed: Project, tmp_path: Path) -> None:
    (committed.root / "router_runtime" / "mine.py").write_text("")
    source = committed.root / "router_runtime" / "errors.py"
    source.write_text(source.read_text() + "# mine\n")
    folder = committed.release("--out", tmp_path / "out", "--target", "sm_90a", "--allow-dirty")
    start = folder.name
    commit = committed.git("rev-parse", "HEAD")
    assert re.fullmatch(rf"{NAME}_sm90a-.*\+g{commit[:12]}\.dirty[0-9a-f]{{12}}", start)
    statement = statement_loads((folder / f"{start}.provenance.json").read_bytes())
    assert statement.changes == (
        "changed router_runtime/errors.py",
        "untracked router_runtime/mine.py",
    )
    entries = _wheel(folder)
    assert entries["router_runtime/errors.py"].endswith(b"# mine\n")
    assert "router_runtime/mine.py" in entries
    assert not marker_loads(entries[f"router_runtime/artifacts/{start}.release.json"]).clean
    assert "uncommitted changes" in (folder / f"{start}.notes.md").read_text()
    said = committed.run("verify-release", folder)
    assert "WITH UNCOMMITTED CHANGES" in said.stdout
    # Other changes are another version; the same ones are the same bytes.
    arguments = ("--out", folder.parent, "--target", "sm_90a", "--allow-dirty")
    assert committed.release(*arguments) == folder
    source.write_text(source.read_text() + "# mine too\n")
    other = committed.release(*arguments)
    assert other.name.partition(".dirty")[0] == folder.name.partition(".dirty")[0]
    assert other != folder
    said = committed.run("verify-release", folder, "--rebuild")
    assert said.returncode == 1
    assert "it cannot be rebuilt" in said.stdout


def test_a_version_that_is_not_one_plain_string_is_refused(committed: Project) -> None:
    path = committed.root / "router_runtime" / "version.py"
    path.write_text('__version__ = "0.1" + ".0"\n')
    committed.commit()
    _refused(committed, "expected one line __version__", "--target", "sm_90a")


def test_a_changelog_without_the_version_is_refused(committed: Project) -> None:
    (committed.root / "CHANGELOG.md").write_text("# Changelog\n\n## 0.0.1\n\n- Old.\n")
    committed.commit()
    _refused(committed, f"a section '## {__version__}'", "--target", "sm_90a")


def test_a_folder_without_a_commit_of_its_own_is_refused(project: Project) -> None:
    _refused(project, "expected a git checkout with a commit")
    (project.root / ".git").mkdir()
    _refused(project, "expected a git checkout with a commit")
    (project.root / ".git").rmdir()
    around = Project(project.root.parent)
    around.commit()
    _refused(project, "found that it is inside")


def test_a_commit_whose_lock_says_otherwise_is_refused(committed: Project) -> None:
    committed.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )
    committed.commit()
    said = _refused(committed, "expected the build that artifacts.lock records")
    assert "changed  source: " in said
    assert "  compiled  " not in said  # the sources alone show it
    committed.git("checkout", "--quiet", "HEAD~1", "build_kernels")
    path = committed.artifacts / "artifacts.lock"
    lines = path.read_text().splitlines(keepends=True)
    (line,) = (line for line in lines if line.startswith("scale/any/sm_90a/one "))
    digest = line.split()[1]
    path.write_text("".join(lines).replace(digest, digest[::-1]))
    committed.commit()
    said = _refused(committed, "expected the build that artifacts.lock records")
    assert "  compiled  " in said
    assert "changed  scale/any/sm_90a/one: " in said


def test_an_entry_that_the_lock_has_and_the_build_lacks_is_refused(committed: Project) -> None:
    path = committed.artifacts / "artifacts.lock"
    line = next(
        row for row in path.read_text().splitlines() if row.startswith("scale/any/sm_90a/one")
    )
    path.write_text(path.read_text().replace("scale/any/sm_90a/one", "scale/any/sm_90a/gone"))
    path.write_text(path.read_text() + line + "\n")
    committed.commit()
    said = _refused(
        committed, "expected the build that artifacts.lock records", "--target", "sm_90a"
    )
    assert "removed  scale/any/sm_90a/gone" in said


@pytest.mark.parametrize("case", ["verified", "unverified", "stale", "cases", "absent"])
def test_required_evidence(committed: Project, tmp_path: Path, case: str) -> None:
    arguments = ["--target", "sm_90a", "--target", "sm_100a", "--require-verified"]
    if case == "verified":
        committed.release("--out", tmp_path / "out", *arguments, "sm_90a")
    elif case == "unverified":
        said = _refused(
            committed, "expected every digest of sm_100a to be verified", *arguments, "sm_100a"
        )
        assert "found 2 of 2 that are not" in said
        assert "scale/any/sm_100a/one: source-verified; no evidence for " in said
        assert "  compiled  " not in said  # artifacts.lock has the digests
    elif case in ("stale", "cases"):
        suite = committed.root / "router_runtime" / "evidence" / "cases.py"
        if case == "stale":
            suite.write_text(suite.read_text() + "SUITE_VERSION += 1\n")
        else:
            suite.write_text(suite.read_text().replace('{"tokens": 1}', '{"tokens": 2}'))
        committed.commit()
        said = _refused(committed, "expected every digest of sm_90a", *arguments, "sm_90a")
        assert "unproven; the evidence of Example GPU is of another suite" in said
        assert "  compiled  " not in said
    else:
        said = _refused(committed, "in this release (sm_90a, sm_100a)", *arguments, "sm_100f")
        assert "found sm_100f; next: --target sm_90a --target sm_100a --target sm_100f" in said
        _refused(committed, "unknown target 'sm_103a': did you mean", *arguments, "sm_103a")


def _statuses(folder: Path) -> list[str]:
    """The rows of a release's notes that are about its entries."""
    (notes,) = folder.glob("*.notes.md")
    return [line for line in notes.read_text().splitlines() if line.startswith("| scale/")]


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


def test_an_emulated_release(committed: Project, tmp_path: Path) -> None:
    """The notes and the statement show it, a receiver accepts it, and it is not verified."""
    committed.build("--update-lock")
    result = committed.python(EMULATION)
    assert result.returncode == 0, result.stderr
    committed.commit()
    folder = committed.release("--out", tmp_path / "out")
    assert [row.split(" | ")[:3] for row in _statuses(folder)] == [
        ["| scale/any/sm_100a/one", "emulated", "Example GPU (9.0)"],
        ["| scale/any/sm_100a/two", "emulated (stale: by another model)", "Example GPU (9.0)"],
        ["| scale/any/sm_90a/one", "unproven", "-"],
        ["| scale/any/sm_90a/two", "unproven", "-"],
    ]
    listed = [" ".join(line.split()) for line in committed.run("list").stdout.splitlines()]
    assert "scale/any/sm_100a/one emulated" in listed
    assert "scale/any/sm_100a/two emulated (stale: by another model)" in listed
    assert "scale/any/sm_90a/one unproven" in listed
    data = json.loads(committed.run("list", "--json").stdout)["entries"]
    assert [(each["status"], each["stale_model"]) for each in data] == [
        *(("emulated", False), ("emulated", True), ("unproven", False), ("unproven", False))
    ]
    (notes,) = folder.glob("*.notes.md")
    assert "| sm_90a | 0 | 0 | 0 | 2 |\n| sm_100a | 0 | 0 | 2 | 0 |" in notes.read_text()
    assert 'Router(..., accept="emulated")' in notes.read_text()
    (statement,) = folder.glob("*.provenance.json")
    records = sorted(path.name for path in (committed.artifacts / "evidence").iterdir())
    assert len(records) == 2
    assert all(name.endswith(".example-gpu.emulated.json") for name in records)
    assert all(f'"evidence/{name}"' in statement.read_text() for name in records)
    assert {f"router_runtime/artifacts/evidence/{name}" for name in records} < (
        _wheel(folder).keys()
    )
    checked = committed.run("verify-release", folder)
    assert checked.returncode == 0, checked.stdout
    said = _refused(
        committed,
        "expected every digest of sm_100a to be verified",
        "--require-verified",
        "sm_100a",
    )
    assert "scale/any/sm_100a/one: emulated; no device of its target has run " in said


def test_evidence_survives_comments_docstrings_and_names_of_files(
    released: Released, committed: Project, tmp_path: Path
) -> None:
    kernel, runtime = committed.kernel_file("scale/scale.cu"), committed.root / "router_runtime"
    _edit(kernel, "extern", "// What it does.\nextern")
    _edit(kernel, "common/factor.cuh", "common/multiplier.cuh")
    header = committed.kernel_file("common/factor.cuh")
    header.write_text("/* The factor. */\n" + header.read_text())
    header.rename(committed.kernel_file("common/multiplier.cuh"))
    contract = committed.kernel_file("scale/contract.py")
    contract.write_text('"""How it is launched."""\n' + contract.read_text())
    _edit(runtime / "evidence" / "cases.py", "@dataclass", "# Remark.\n@dataclass")
    cases = runtime / "evidence" / "cases.py"
    cases.write_text(cases.read_text().replace('"""', '"""Remark. ', 1))
    _edit(runtime / "spec.py", "\nimport torch\n", "\nimport torch  # remark\n")
    committed.commit()
    folder = committed.release("--out", tmp_path / "out", "--require-verified", "sm_90a")
    assert _statuses(folder) == _statuses(released.folder)
    assert committed.run("verify-release", folder).returncode == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/scale/scale.cu", "x[i] * factor()", "x[i] / factor()"),
        ("kernels/scale/scale.cu", "(i < tokens)", "(i <= tokens)"),
        ("kernels/common/factor.cuh", "FACTOR", "FACTOR * 3.0f"),
        ("catalog/kernels.py", '{"FACTOR": 5.0}', '{"FACTOR": 7.0}'),
    ],
)
def test_evidence_is_of_no_other_operator_literal_or_constant(
    committed: Project, file: str, old: str, new: str
) -> None:
    _edit(committed.root / "build_kernels" / file, old, new)
    committed.build("--update-lock")
    committed.commit()
    said = _refused(
        committed, "expected every digest of sm_90a to be verified", "--require-verified", "sm_90a"
    )
    assert "unproven; no evidence for " in said


def test_the_digest_of_a_cubin_alone_makes_it_verified(committed: Project, tmp_path: Path) -> None:
    """Other sources with the same machine code: evidence for it holds."""
    source = committed.kernel_file("scale/scale.cu")
    source.write_text(source.read_text() + "#define UNUSED 1\n")
    committed.build("--update-lock")
    committed.commit()
    folder = committed.release("--out", tmp_path / "out", "--require-verified", "sm_90a")
    found = [row.split(" | ")[:2] for row in _statuses(folder)]
    assert found == [
        [f"| {key}", "verified" if "sm_90a" in key else "unproven"] for key in RELEASED_KEYS
    ]
    assert committed.run("verify-release", folder).returncode == 0


def test_evidence_that_is_altered_is_refused(committed: Project) -> None:
    path = next((committed.artifacts / "evidence").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"rows"', b'"rowz"'))
    committed.commit()
    # The releaser sees the runtime's error with its own message.
    _refused(committed, "expected exactly the keys", "--target", "sm_90a")


def test_a_release_made_again_is_the_same(
    released: Released, committed: Project, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    unsigned = committed.run("release", "--out", out, "--target", "sm_90a")
    assert "made, UNSIGNED (no --key)" in unsigned.stdout
    (folder,) = out.iterdir()
    before = snapshot(folder)
    again = committed.run("release", "--out", out, "--target", "sm_90a")
    assert "the same bytes were there already, UNSIGNED" in again.stdout
    assert snapshot(folder) == before
    # A signature can be added: one file, and nothing else changes.
    signed = committed.run("release", "--out", out, "--target", "sm_90a", "--key", released.key)
    assert "the same bytes were there already, signed" in signed.stdout
    after = snapshot(folder)
    envelope = f"{folder.name}.dsse.json"
    assert after.keys() - before.keys() == {envelope}
    assert all(after[name] == before[name] for name in before)
    assert committed.run("verify-release", folder, "--key", released.public).returncode == 0
    # One that is killed before it is done leaves nothing among the files.
    (folder / envelope).unlink()
    script = FAILING.format(
        target="os.fsync",
        step=5,
        action="os.kill(os.getpid(), 9)",
        arguments=["release", "--out", str(out), "--target", "sm_90a", "--key", str(released.key)],
    )
    assert committed.python(script).returncode == -9
    assert snapshot(folder) == before
    # Anything else that lies there is not overwritten.
    (folder / "manifest.json").write_bytes(b"mine")
    refused = committed.run("release", "--out", out, "--target", "sm_90a")
    assert refused.returncode == 1
    assert "found manifest.json to differ; a release is never overwritten" in refused.stdout
    assert (folder / "manifest.json").read_bytes() == b"mine"


def test_one_release_at_a_time_in_a_folder(committed: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        result = committed.run("release", "--out", out)
        assert result.returncode == 1
        assert f"expected to be the only build in {out}" in result.stdout
        assert not any(out.iterdir())
    finally:
        os.close(descriptor)


def test_what_a_killed_release_left_is_removed(committed: Project, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".release-abc.tmp"
    left.mkdir(parents=True)
    (left / "half").touch()
    (tmp_path / "out" / "mine.tmp").touch()
    folder = committed.release("--out", tmp_path / "out", "--target", "sm_90a")
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "mine.tmp"}


# Fail like a full disk, from the n-th write on.
FAILING = """
import errno, os
from build_kernels.cli import main

times = 0
def fail(*arguments, **options):
    global times
    times += 1
    if times > {step}:
        {action}
    return original(*arguments, **options)

original = {target}
{target} = fail
main({arguments!r})
"""


@pytest.mark.parametrize(
    ("step", "error"), [(0, "ENOSPC"), (4, "EIO"), (7, "ENOSPC"), (9, "EROFS"), (14, "ENOSPC")]
)
def test_a_failing_disk_leaves_no_release(
    committed: Project, tmp_path: Path, step: int, error: str
) -> None:
    out = tmp_path / "out"
    script = FAILING.format(
        target="os.fsync",
        step=step,
        action=f"raise OSError(errno.{error}, os.strerror(errno.{error}))",
        arguments=["release", "--out", str(out), "--target", "sm_90a", "--jobs", "1"],
    )
    result = committed.python(script)
    assert result.returncode == 1
    assert f"expected to write in {out}" in result.stderr
    assert "next: make room or mend the disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("step", [1, 5])
def test_a_vanished_disk_is_an_error(committed: Project, tmp_path: Path, step: int) -> None:
    out = tmp_path / "out"
    script = "import shutil\n" + FAILING.format(
        target="os.replace",
        step=step,
        action=f"shutil.rmtree({str(out)!r}, ignore_errors=True)",
        arguments=["release", "--out", str(out), "--target", "sm_90a", "--jobs", "1"],
    )
    result = committed.python(script)
    assert result.returncode == 1
    assert f"expected to write in {out}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_sources_that_change_during_a_release_publish_nothing(
    committed: Project, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = FAILING.format(
        target="contents.wheel.make",
        step=0,
        action="open('router_runtime/errors.py', 'a').write('#')",
        arguments=["release", "--out", str(out), "--target", "sm_90a", "--jobs", "1"],
    )
    result = committed.python("from build_kernels.release import contents\n" + script)
    assert result.returncode == 1
    assert "expected the checkout to stay as it was during the release" in result.stderr
    assert not out.exists()


def test_a_backend_that_leaves_a_file_out_is_an_error(committed: Project, tmp_path: Path) -> None:
    path = committed.root / "pyproject.toml"
    path.write_text(
        path.read_text().replace(
            "[tool.hatch.build.targets.wheel]",
            '[tool.hatch.build.targets.wheel]\nexclude = ["router_runtime/errors.py"]',
        )
    )
    committed.commit()
    _refused(committed, "missing ['router_runtime/errors.py']", "--target", "sm_90a")


def test_a_backend_that_fails_is_an_error(tmp_path: Path) -> None:
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    package = {"router_runtime/version.py": b'__version__ = "1"\n'}
    with pytest.raises(BuildError, match=r"(?s)build backend.*README\.md.*\nnext: mend what"):
        wheel.make("x", pyproject, {}, package, b"{}", tmp_path)


def _pem(key: object, password: bytes | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


@pytest.mark.parametrize("case", ["absent", "text", "curve", "public", "readable", "inside"])
def test_keys_that_are_refused(committed: Project, tmp_path: Path, case: str) -> None:
    key, public = write_keys(tmp_path)
    message = "expected an ed25519 private key"
    if case == "absent":
        key.unlink()
        message = "expected a private key in "
    elif case == "text":
        key.write_text("a key\n")
    elif case == "curve":
        key.write_bytes(_pem(ec.generate_private_key(ec.SECP256R1())))
    elif case == "public":
        key.write_bytes(public.read_bytes())
    elif case == "readable":
        key.chmod(0o640)
        message = "expected a private key that only its owner can read"
    else:
        key = key.rename(committed.root / "artifacts" / "key.pem")
        message = "expected a private key outside the checkout"
    _refused(committed, message, "--key", key, "--allow-dirty")
    assert key.exists() == (case != "absent")  # none is made


def test_a_key_can_have_a_password(released: Released, tmp_path: Path) -> None:
    from build_kernels.release import signing

    private = ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    path.write_bytes(_pem(private, b"secret"))
    root = released.project.root
    signer = signing.private_key(path, root, lambda: "secret")
    public = tmp_path / "key.pub"
    public.write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    envelope = dsse.loads(signing.sign(b"{}", signer))
    assert envelope.payload == b"{}"
    assert dsse.is_signed_by(envelope, dsse.public_key_file(public))
    with pytest.raises(BuildError, match="expected an ed25519 private key in PEM"):
        signing.private_key(path, root, lambda: "wrong")


def test_other_release_tools_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.check_release()
    installed = dict(toolchain._installed())
    monkeypatch.setattr(toolchain, "_installed", lambda: installed | {"hatchling": "1.0"})
    with pytest.raises(BuildError, match=r"hatchling: expected 1\.\d+\.\d+, found 1\.0"):
        toolchain.check_release()
    del installed["cryptography"]
    with pytest.raises(BuildError, match=r"cryptography: expected .*, found none"):
        toolchain.check_release()


def test_names_of_distributions() -> None:
    assert contents.distribution("x", DEFAULT_TARGETS) == "x"
    assert contents.distribution("x", ("sm_90a",)) == "x-sm90a"
    assert contents.distribution("x", ("sm_90a", "sm_100a")) == "x-sm90a-sm100a"


def test_an_installed_package_releases_nothing(fresh: Project) -> None:
    (fresh.root / "pyproject.toml").unlink()
    _refused(fresh, "expected a checkout, found an installed package")


def test_what_was_published_before_a_failing_build_stays(project: Project) -> None:
    """The disk under a build, not a release: the old build stays whole."""
    before = snapshot(project.artifacts)
    project.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )
    old: Manifest = loads((project.artifacts / "manifest.json").read_bytes())
    for step in (0, 5):
        script = FAILING.format(
            target="os.fsync",
            step=step,
            action="raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))",
            arguments=["build"],
        )
        result = project.python(script)
        assert result.returncode == 1
        assert "found: no space left on the device" in result.stderr
        assert "what was published there before is as it was" in result.stderr
        assert "Traceback" not in result.stderr
        assert all(
            publish.bytes_with_digest(project.artifacts, e.file, e.sha256) for e in old.entries
        )
        after = snapshot(project.artifacts)
        assert {name: after[name] for name in before} == before


def test_a_build_whose_folder_vanishes_is_an_error(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "import shutil\n" + FAILING.format(
        target="os.replace",
        step=1,
        action=f"shutil.rmtree({str(out)!r}, ignore_errors=True)",
        arguments=["build", "--kernel", "scale", "--out", str(out)],
    )
    result = project.python(script)
    assert result.returncode == 1
    assert f"expected to write in {out}" in result.stderr
    assert "Traceback" not in result.stderr
    assert shutil.disk_usage(tmp_path)


@pytest.mark.parametrize("command", [("release",), ("build", "--kernel", "scale")])
def test_a_folder_that_cannot_be_made_is_an_error(
    committed: Project, command: tuple[str, ...]
) -> None:
    # No user can make a folder there, not even the superuser, who may ignore file modes.
    out = Path("/proc/out")
    result = committed.run(*command, "--out", out)
    assert result.returncode == 1
    assert f"expected to write in {out}" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("built", [True, False])
def test_evidence_that_a_changed_checkout_lacks_is_missed_as_early_as_it_is_known(
    committed: Project, built: bool
) -> None:
    """What artifacts/ has a cubin of the same inputs for is known; the rest is compiled first."""
    committed.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )
    if built:
        committed.build()
    arguments = ("--allow-dirty", "--target", "sm_90a", "--require-verified", "sm_90a")
    said = _refused(committed, "expected every digest of sm_90a to be verified", *arguments)
    assert ("  compiled  " in said) == (not built)


def test_a_release_can_have_a_model_of_ones_own(committed: Project, tmp_path: Path) -> None:
    """It has everything that the commit has, and the model: named in the wheel's name, its shape in
    the version and in the statement, from which it is rebuilt.
    """
    committed.append(
        "catalog/kernels.py",
        'KERNELS += (Kernel("shape", "cuda", True, False, (Variant("one", {"FACTOR": 3.0}),)),)\n',
    )
    shutil.copytree(committed.kernel_file("scale"), committed.kernel_file("shape"))
    source = committed.kernel_file("shape/scale.cu")
    text = source.read_text().replace(" scale(", " shape(")
    source.rename(source.with_name("shape.cu")).write_text(text)
    committed.build("--update-lock")
    commit = committed.commit()
    (tmp_path / "mine.toml").write_text(MODEL + 'scoring = "sigmoid"\n')
    release = ("--out", tmp_path / "out", "--target", "sm_90a", "--model-file")
    folder = committed.release(*release, tmp_path / "mine.toml")
    start, _, version = folder.name.partition("-")
    assert start == "dsv4_router_runtime_sm90a_with_pruned"
    assert version.startswith(f"0.1.0+g{commit[:12]}.models")
    statement = statement_loads((folder / f"{folder.name}.provenance.json").read_bytes())
    assert statement.clean
    shape = {"hidden": 4096, "experts": 144, "top_k": 6, "scale": 1.5}
    shape |= {"hash_layers": 3, "vocab": 129280}
    assert statement.models == {"pruned": {**shape, "scoring": "sigmoid"}}
    keys = [entry.key for entry in loads((folder / "manifest.json").read_bytes()).entries]
    assert keys == [
        *("scale/any/sm_90a/one", "scale/any/sm_90a/two"),
        *("shape/dsv4-flash/sm_90a/one", "shape/dsv4-pro/sm_90a/one", "shape/pruned/sm_90a/one"),
    ]
    said = committed.run("verify-release", folder, "--rebuild", "--jobs", "1")
    assert said.returncode == 0, said.stdout
    assert "the commit gives the same bytes again" in said.stdout
    # Another shape of that name is another version.
    (tmp_path / "mine.toml").write_text(MODEL.replace("144", "160"))
    assert committed.release(*release, tmp_path / "mine.toml").name != folder.name
    (tmp_path / "mine.toml").write_text(MODEL.replace("144", "0"))
    _refused(committed, "experts: expected 1 to 1024", "--model-file", tmp_path / "mine.toml")


def test_a_model_may_have_a_name_that_a_distribution_cannot() -> None:
    assert contents.distribution("x", DEFAULT_TARGETS, ["My_own.v2"]) == "x-with-my-own-v2"
    assert contents.distribution("x", ("sm_90a",), ["_"]) == "x-sm90a-with-model"
