"""The signature policy: only signed files are loaded, for every caller and at any time."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import router_runtime
from router_runtime import Router, RouterConfig
from router_runtime.cli import diagnosis, screen
from router_runtime.device import artifact_store as artifacts
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request
from router_runtime.errors import DISTRIBUTION, ArtifactError, TrustError
from router_runtime.evidence import store
from router_runtime.format import advice, provenance
from router_runtime.format.files import read_file
from router_runtime.format.manifest import MANIFEST_NAME, dumps
from router_runtime.trust import policy as trust
from router_runtime.verification import verify
from tests.runtime import releases
from tests.runtime.releases import KEY, OTHER_KEY, Release

ROOT = Path(__file__).parents[2]
VARIABLES = (
    trust.PUBLIC_KEY_VARIABLE,
    trust.ENVELOPE_VARIABLE,
    trust.LOCAL_EVIDENCE_VARIABLE,
    store.ENVIRONMENT_VARIABLE,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded nothing and required nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trust, "process", trust.Process())


@pytest.fixture
def release(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Release:
    """A signed release with evidence for every entry, as a wheel has it."""
    fake.entries = build.small()
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    releases.add_evidence(folder / "evidence", fake.entries)
    releases.add_marker(folder)
    return releases.sign(folder)


def require(release: Release, **options: Any) -> None:
    router_runtime.require_signature(release.public_key, release.envelope, **options)


def load(release: Release, entries: list[Any]) -> None:
    """Everything that Routers and ops on a device do to load."""
    kernels = kernels_on(0, release.folder)
    for kernel in {entry.kernel for entry in entries}:
        kernels.load(Request(kernel))
    for entry in entries:
        kernels.load_entry(entry)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


# --- what is signed is loaded --------------------------------------------------------------------


def test_a_signed_release_loads(release: Release, fake: Any) -> None:
    require(release)
    load(release, fake.entries)
    assert fake.calls.count("cuLibraryLoadData") == len(fake.entries)


def test_a_key_can_be_given_as_bytes(release: Release, fake: Any) -> None:
    router_runtime.require_signature(release.public_key.read_bytes(), str(release.envelope))
    load(release, fake.entries)


def test_a_second_signature_is_no_harm(release: Release, fake: Any) -> None:
    payload = base64.b64decode(json.loads(release.envelope.read_bytes())["payload"])
    release.envelope.write_text(json.dumps(releases.envelope_of(payload, OTHER_KEY, KEY)))
    require(release)
    load(release, fake.entries)


def test_without_a_policy_nothing_is_imported(release: Release) -> None:
    code = (
        "import sys; from pathlib import Path; from router_runtime.device import artifact_store; "
        f"artifact_store.read_manifest(Path({str(release.folder)!r})); "
        "print('cryptography' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# --- the envelope --------------------------------------------------------------------------------


def sign_by_another(release: Release) -> None:
    payload = base64.b64decode(json.loads(release.envelope.read_bytes())["payload"])
    release.envelope.write_text(json.dumps(releases.envelope_of(payload, OTHER_KEY)))


def remove_signatures(release: Release) -> None:
    rewrite(release.envelope, lambda document: document["signatures"].clear())


def flip_the_signature(release: Release) -> None:
    def change(document: Any) -> None:
        signature = bytearray(base64.b64decode(document["signatures"][0]["sig"]))
        signature[7] ^= 1
        document["signatures"][0]["sig"] = base64.b64encode(signature).decode()

    rewrite(release.envelope, change)


def alter_the_payload(release: Release) -> None:
    def change(document: Any) -> None:
        payload = base64.b64decode(document["payload"]).replace(b'"sm_90a"', b'"sm_80a"')
        document["payload"] = base64.b64encode(payload).decode()

    rewrite(release.envelope, change)


def other_payload_type(release: Release) -> None:
    payload = base64.b64decode(json.loads(release.envelope.read_bytes())["payload"])
    signed = releases.envelope_of(payload, KEY, kind="text/plain")
    release.envelope.write_text(json.dumps(signed))


def unsigned_statement(release: Release) -> None:
    payload = base64.b64decode(json.loads(release.envelope.read_bytes())["payload"])
    release.envelope.write_bytes(payload)


def statement_of_another_kind(release: Release) -> None:
    payload = b'{"_type": "https://in-toto.io/Statement/v1", "subject": []}'
    release.envelope.write_text(json.dumps(releases.envelope_of(payload, KEY)))


def statement_written_differently(release: Release) -> None:
    payload = base64.b64decode(json.loads(release.envelope.read_bytes())["payload"])
    compact = json.dumps(json.loads(payload)).encode()
    release.envelope.write_text(json.dumps(releases.envelope_of(compact, KEY)))


def no_base64(release: Release) -> None:
    rewrite(release.envelope, lambda document: document.update(payload="*"))


def number_for_a_signature(release: Release) -> None:
    rewrite(release.envelope, lambda document: document["signatures"][0].update(sig=1))


def unknown_key(release: Release) -> None:
    rewrite(release.envelope, lambda document: document.update(trust="me"))


def unknown_key_in_a_signature(release: Release) -> None:
    rewrite(release.envelope, lambda document: document["signatures"][0].update(trust="me"))


def too_many_signatures(release: Release) -> None:
    rewrite(release.envelope, lambda document: document["signatures"].extend([{}] * 16))


def key_twice(release: Release) -> None:
    text = release.envelope.read_text()
    release.envelope.write_text('{"payload": "", ' + text[1:])


def truncated(release: Release) -> None:
    release.envelope.write_bytes(release.envelope.read_bytes()[:-20])


def missing(release: Release) -> None:
    release.envelope.unlink()


def a_link(release: Release) -> None:
    release.envelope.rename(release.envelope.with_name("elsewhere"))
    release.envelope.symlink_to(release.envelope.with_name("elsewhere"))


def older_release(release: Release) -> None:
    releases.sign(release.folder, version="0.0.9")


def another_package(release: Release) -> None:
    releases.sign(release.folder, distribution="dsv4-router-runtimes")


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (sign_by_another, "a signature by the given public key"),
        (remove_signatures, "the envelope is unsigned"),
        (flip_the_signature, "a signature by the given public key"),
        (alter_the_payload, "a signature by the given public key"),
        (other_payload_type, "expected the payload type"),
        (unsigned_statement, "exactly the keys"),
        (statement_of_another_kind, "expected a provenance statement"),
        (statement_written_differently, "canonical form"),
        (no_base64, "payload: expected base64"),
        (number_for_a_signature, "sig: expected base64, found int"),
        (unknown_key, "exactly the keys"),
        (unknown_key_in_a_signature, "exactly the keys"),
        (too_many_signatures, "expected 1 to 16 signatures"),
        (key_twice, "each key once"),
        (truncated, "expected a DSSE envelope in JSON"),
        (missing, "no such file"),
        (a_link, "a link to"),
        (older_release, f"{DISTRIBUTION} {router_runtime.__version__}.*found .* 0.0.9"),
        (another_package, "found dsv4-router-runtimes"),
    ],
)
def test_a_bad_envelope_is_refused_and_nothing_loads(
    release: Release, fake: Any, attack: Callable[[Release], None], message: str
) -> None:
    attack(release)
    with pytest.raises(TrustError, match=message):
        require(release)
    # A caller that required a policy and swallowed the error cannot go on without one.
    with pytest.raises(TrustError, match=message):
        load(release, fake.entries)
    assert "cuLibraryLoadData" not in fake.calls


def test_a_release_for_some_targets_is_of_this_package(release: Release, fake: Any) -> None:
    require(releases.sign(release.folder, distribution="dsv4-router-runtime-sm90a"))
    load(release, fake.entries)


def test_a_correct_call_after_a_failed_one(release: Release, fake: Any) -> None:
    with pytest.raises(TrustError, match="no such file"):
        router_runtime.require_signature(release.public_key, release.envelope.with_name("typo"))
    require(release)
    load(release, fake.entries)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (b"", "expected an ed25519 public key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nMCowB\n-----END PUBLIC KEY-----\n", "found no key"),
        (releases.pem(KEY).replace(b"MCow", b""), "found a key of another kind"),
        (releases.pem(KEY) * 2, "found no key"),
        (releases.pem(KEY).replace(b"PUBLIC", b"PRIVATE"), "found no key"),
        (releases.pem(X25519PrivateKey.generate()), "found a key of another kind"),
        ("/nowhere/key.pub", "expected a readable /nowhere/key.pub"),
    ],
)
def test_a_bad_key_is_refused(release: Release, key: Any, message: str) -> None:
    with pytest.raises(TrustError, match=message):
        router_runtime.require_signature(key, release.envelope)


def test_without_the_library_the_policy_is_refused(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    message = r"expected the package cryptography.*pip install 'cryptography>=42'"
    with pytest.raises(TrustError, match=message):
        require(release)
    with pytest.raises(TrustError, match=message):
        load(release, fake.entries)


def test_the_version_is_the_distributions() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["dynamic"]) == (DISTRIBUTION, ["version"])


# --- the files -----------------------------------------------------------------------------------


def other_manifest(release: Release, build: SimpleNamespace) -> None:
    """Valid, with the same cubins, and one launch changed."""
    rewrite(
        release.folder / MANIFEST_NAME, lambda document: document.update(source_sha256="9" * 64)
    )


def newer_manifest_and_cubins(release: Release, build: SimpleNamespace) -> None:
    build.artifacts(release.folder, build.small(workspace=64))


def other_evidence(release: Release, build: SimpleNamespace) -> None:
    (path,) = (release.folder / "evidence").glob("hash_router-*")
    rewrite(path, lambda document: document.update(driver=12090))


def more_evidence(release: Release, build: SimpleNamespace) -> None:
    releases.add_evidence(release.folder / "evidence", build.small()[:1], "Another GPU")


def other_marker(release: Release, build: SimpleNamespace) -> None:
    (path,) = release.folder.glob("*.release.json")
    path.write_bytes(path.read_bytes().replace(b"c0ffee", b"decade"))


@pytest.mark.parametrize(
    ("attack", "name", "kernel"),
    [
        (other_manifest, MANIFEST_NAME, ""),
        (newer_manifest_and_cubins, MANIFEST_NAME, ""),
        (other_evidence, r"evidence/.*\.json", "hash_router"),
        (more_evidence, r"evidence/.*another-gpu\.json.*not among them", "hash_router"),
        (other_marker, r"release\.json", ""),
    ],
)
def test_files_that_are_not_signed(
    release: Release,
    fake: Any,
    build: SimpleNamespace,
    attack: Callable[[Release, SimpleNamespace], None],
    name: str,
    kernel: str,
) -> None:
    """Nothing is loaded, or, where it is about the evidence of one kernel, not that one."""
    require(release)
    attack(release, build)
    with pytest.raises(TrustError, match=rf"signature over .*{name}"):
        load(release, fake.entries)
    assert not [call for call in fake.calls if call.startswith(f"cuFuncLoad {kernel}")]


def test_records_of_emulation_must_be_signed_too(release: Release, build: SimpleNamespace) -> None:
    entry = build.small("sm_100a")[0]
    store.write_record(releases.emulation_of(entry), release.folder / "evidence")
    require(release)
    with pytest.raises(TrustError, match=r"signature over .*\.emulated\.json"):
        list(store.read_evidence(release.folder).emulations_of(entry.sha256))


def test_an_older_signed_manifest_with_newer_cubins(
    release: Release, fake: Any, build: SimpleNamespace
) -> None:
    """The manifest and its signature are genuine; files of the same
    names have other machine code.
    """
    require(release)
    for entry in fake.entries:
        (release.folder / entry.file).write_bytes(build.code(entry)[:-1] + b"2")
    with pytest.raises(ArtifactError, match="altered"):
        load(release, fake.entries)
    assert "cuLibraryLoadData" not in fake.calls


def test_a_signed_manifest_needs_signed_cubins(
    release: Release, fake: Any, build: SimpleNamespace
) -> None:
    """A statement that lists the manifest alone covers no machine code."""
    kept = releases.subjects_of(release.folder)
    kept = {name: sha256 for name, sha256 in kept.items() if not name.endswith(".cubin")}
    payload = provenance.statement_dumps(releases.statement_of(kept))
    release.envelope.write_text(json.dumps(releases.envelope_of(payload, KEY)))
    require(release)
    with pytest.raises(TrustError, match=r"signature over .*\.cubin.*not among them"):
        load(release, fake.entries)
    assert "cuLibraryLoadData" not in fake.calls
    with pytest.raises(TrustError, match="not among them"):  # as doctor reads them
        artifacts.read_cubin(fake.entries[0], release.folder)


def test_a_router_and_the_ops_are_bound_by_it(
    release: Release, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(advice.ARTIFACTS_VARIABLE, str(release.folder))
    require(release)
    other_manifest(release, SimpleNamespace())
    config = RouterConfig(64, 16, 4, 1.5, mode="hash", vocab_size=4)
    table = torch.zeros(4, 4, dtype=torch.int32)
    # A CPU router is the oracle itself: it loads nothing that could be signed.
    Router(config, table=table, device="cpu")
    with pytest.raises(TrustError, match="signature over"):
        kernels_on(0)


# --- one policy a process ------------------------------------------------------------------------


def test_repeating_it_changes_nothing(release: Release, fake: Any) -> None:
    require(release)
    require(release)
    load(release, fake.entries)


def another_key(release: Release) -> None:
    require(releases.sign(release.folder, "other", OTHER_KEY))


def another_release(release: Release) -> None:
    require(releases.sign(release.folder, "other", commit="d" * 40))


def local_evidence(release: Release) -> None:
    require(release, local_evidence=True)


@pytest.mark.parametrize("weaken", [another_key, another_release, local_evidence])
def test_it_cannot_be_exchanged(
    release: Release, fake: Any, weaken: Callable[[Release], None]
) -> None:
    require(release)
    before = trust.policy()
    with pytest.raises(TrustError, match="expected the one in force"):
        weaken(release)
    assert trust.policy() is before
    load(release, fake.entries)


def test_a_failed_call_leaves_it_in_force(release: Release, fake: Any) -> None:
    require(release)
    with pytest.raises(TrustError, match="no such file"):
        router_runtime.require_signature(release.public_key, "/nowhere")
    load(release, fake.entries)
    other_manifest(release, SimpleNamespace())
    with pytest.raises(TrustError):
        load(release, fake.entries)


def test_what_was_loaded_before_is_covered(release: Release, fake: Any) -> None:
    load(release, fake.entries)
    require(release)
    load(release, fake.entries)


def test_what_was_loaded_before_and_is_not_covered_is_reported(
    release: Release, fake: Any, build: SimpleNamespace
) -> None:
    unsigned = build.artifacts(release.folder.parent / "unsigned", build.small(workspace=64))
    before = kernels_on(0, unsigned)
    with pytest.raises(TrustError, match=r"nothing loaded before it.*unsigned/manifest\.json"):
        require(release)
    # It is in force all the same, for folders new and old.
    load(release, fake.entries)
    with pytest.raises(TrustError, match="signature over"):
        kernels_on(0, unsigned)
    with pytest.raises(TrustError, match="one read before it; build the Router again"):
        before.load_entry(before.manifest.entries[0])


def test_a_kernel_in_the_cache_is_no_way_round(
    release: Release, fake: Any, build: SimpleNamespace
) -> None:
    """Loaded unsigned, then loaded again under a policy by a caller with its own manifest."""
    from router_runtime.device.loader import load_entry

    fake.entries = entries = build.small("sm_90a", workspace=64)
    entry = build.entry("hash_router", build.hash(), variant="unsigned")
    fake.entries = [*entries, entry]
    folder = build.artifacts(release.folder.parent / "unsigned", [entry])
    manifest = artifacts.read_manifest(folder)
    load_entry(entry, manifest, folder, 0)
    with pytest.raises(TrustError, match="nothing loaded before"):
        require(release)
    with pytest.raises(TrustError, match="not among them"):
        load_entry(entry, manifest, folder, 0)


# --- the environment -----------------------------------------------------------------------------


def set_environment(monkeypatch: pytest.MonkeyPatch, release: Release) -> None:
    monkeypatch.setenv(trust.PUBLIC_KEY_VARIABLE, str(release.public_key))
    monkeypatch.setenv(trust.ENVELOPE_VARIABLE, str(release.envelope))


def test_from_the_environment(release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, release)
    load(release, fake.entries)
    other_manifest(release, SimpleNamespace())
    with pytest.raises(TrustError, match="signature over"):
        load(release, fake.entries)


def test_taking_the_variables_away_takes_nothing_back(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, release)
    load(release, fake.entries)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    other_manifest(release, SimpleNamespace())
    with pytest.raises(TrustError, match="signature over"):
        load(release, fake.entries)


@pytest.mark.parametrize("name", [trust.PUBLIC_KEY_VARIABLE, trust.ENVELOPE_VARIABLE])
def test_half_an_environment_is_refused(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    set_environment(monkeypatch, release)
    monkeypatch.delenv(name)
    with pytest.raises(TrustError, match=r"expected both .*set both, or neither"):
        load(release, fake.entries)


def test_an_unreadable_environment_loads_nothing(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, release)
    release.envelope.unlink()
    for _ in range(2):
        with pytest.raises(TrustError, match="no such file"):
            load(release, fake.entries)


def test_the_environment_and_a_call_must_agree(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, release)
    require(release)
    load(release, fake.entries)
    set_environment(monkeypatch, releases.sign(release.folder, "other", OTHER_KEY))
    with pytest.raises(TrustError, match="expected the one in force"):
        load(release, fake.entries)


# --- evidence of the user's own ------------------------------------------------------------------


@pytest.fixture
def own(release: Release, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own with evidence for every entry, and none shipped."""
    for path in (release.folder / "evidence").iterdir():
        path.unlink()
    releases.sign(release.folder)
    folder = release.folder.parent / "own"
    releases.add_evidence(folder, build.small())
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(folder))
    return folder


def test_local_evidence_must_be_trusted_by_name(own: Path, release: Release, fake: Any) -> None:
    require(release)
    with pytest.raises(TrustError, match=rf"evidence in {own}.*{trust.LOCAL_EVIDENCE_VARIABLE}=1"):
        load(release, fake.entries)


def test_trusted_local_evidence_counts(own: Path, release: Release, fake: Any) -> None:
    require(release, local_evidence=True)
    load(release, fake.entries)


def test_local_evidence_adds_no_machine_code(own: Path, release: Release, fake: Any) -> None:
    require(release, local_evidence=True)
    other_manifest(release, SimpleNamespace())
    with pytest.raises(TrustError, match="signature over"):
        load(release, fake.entries)


@pytest.mark.parametrize(("value", "trusted"), [("1", True), ("0", False), ("", False)])
def test_local_evidence_by_the_environment(
    own: Path,
    release: Release,
    fake: Any,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    trusted: bool,
) -> None:
    set_environment(monkeypatch, release)
    monkeypatch.setenv(trust.LOCAL_EVIDENCE_VARIABLE, value)
    if trusted:
        load(release, fake.entries)
    else:
        with pytest.raises(TrustError, match="evidence in"):
            load(release, fake.entries)


def test_a_misspelt_answer_is_refused(
    own: Path, release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, release)
    monkeypatch.setenv(trust.LOCAL_EVIDENCE_VARIABLE, "yes")
    with pytest.raises(TrustError, match="expected 1 or 0, found yes"):
        load(release, fake.entries)


def test_local_evidence_read_before_is_reported(own: Path, release: Release, fake: Any) -> None:
    load(release, fake.entries)
    with pytest.raises(TrustError, match=f"evidence in {own}"):
        require(release)


def test_recording_beside_a_signed_manifest_is_refused(release: Release, fake: Any) -> None:
    """It would be refused when read; better before the GPU's time is spent."""
    require(release)
    with pytest.raises(TrustError, match="name a folder of your own: --evidence DIR"):
        verify.run(release.folder, True, lambda _: None)


def test_doctor_says_what_is_required(release: Release, fake: Any) -> None:
    require(release)
    found = diagnosis.diagnose(release.folder)
    assert found.usable
    assert "signature required: dsv4-router-runtime 0.1.0 of commit c0ffee" in "\n".join(
        screen.lines(found)
    )
    other_manifest(release, SimpleNamespace())
    found = diagnosis.diagnose(release.folder)
    assert not found.usable
    assert "signature over" in found.problems[-1].text


def test_the_digest_is_of_the_bytes_that_are_used(
    release: Release, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are exchanged right after they were read: what was signed is what is used."""
    require(release)
    genuine = read_file

    def reading(path: Path, *rest: Any, **options: Any) -> bytes:
        data = genuine(path, *rest, **options)
        os.replace(path, path.with_name("moved"))
        path.write_bytes(b"exchanged")
        return data

    monkeypatch.setattr(artifacts, "read_file", reading)
    monkeypatch.setattr(store, "read_file", reading)
    manifest = artifacts.read_manifest(release.folder)
    assert dumps(manifest) != (release.folder / MANIFEST_NAME).read_bytes() == b"exchanged"
    assert store.read_evidence(release.folder).records
    from router_runtime.device.loader import load_entry

    for entry in fake.entries:
        load_entry(entry, manifest, release.folder, 0)  # the fake driver knows the genuine bytes
        assert (release.folder / entry.file).read_bytes() == b"exchanged"
