"""What this machine can serve: looks at driver, artifacts and evidence, and makes the report."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router_runtime.cli.decisions import (
    imagined_device,
    router_decisions,
    row_op_decisions,
)
from router_runtime.cli.report import (
    SCHEMA,
    Artifacts,
    Device,
    Diagnosis,
    EvidenceSummary,
    Problem,
    Software,
)
from router_runtime.cli.variables import misspelled
from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts, read_cubin, read_manifest
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.ladder import STATUSES, serves
from router_runtime.evidence.status import status
from router_runtime.evidence.store import (
    ENVIRONMENT_VARIABLE,
    EVIDENCE_NAME,
    Evidence,
    files,
    folders,
    own_folder,
    read_evidence,
)
from router_runtime.format.advice import (
    DRIVER,
    REINSTALL,
    build_artifacts,
    checkout,
    record_emulation,
    record_evidence,
    runtime,
)
from router_runtime.format.files import exists
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.source_note import changed_since
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust
from router_runtime.version import __version__

_PACKAGE = "router_runtime"
#: A problem names at most so many files.
_MOST_NAMES = 5


@dataclass(frozen=True, slots=True)
class Place:
    """A device to decide for: present with its indices, or imagined for a target."""

    name: str
    indices: tuple[int, ...]
    target: str | None
    facts: DeviceFacts


@dataclass(frozen=True, slots=True)
class Contents:
    """A readable artifacts folder with its evidence."""

    folder: Path
    manifest: Manifest
    evidence: Evidence

    def status(self, entry: Entry) -> str:
        """The evidence status of ``entry`` on the device of its target where it is best."""
        return status(entry, self.manifest, self.evidence, None)

    def status_on(self, capability: tuple[int, int]) -> Callable[[Entry], str]:
        """The evidence status of entries on devices of a compute capability."""

        def status_of(entry: Entry) -> str:
            return status(entry, self.manifest, self.evidence, capability)

        return status_of


def diagnose(
    artifacts: str | os.PathLike[str] | None, target: str | None = None, accept: str | None = None
) -> Diagnosis:
    """The report for an artifacts folder (see ``find_artifacts``) on this machine's GPUs.

    Without a GPU, or with ``target``, the decisions are those for devices that are not here: one
    for each compute capability that a target of the manifest, or ``target``, is made for.
    ``accept`` is that of the Routers.
    """
    problems: list[Problem] = []
    software, present = _machine(problems)
    problems.extend(misspelled(os.environ))
    contents = _contents(artifacts, problems)
    if contents is None:
        return Diagnosis(SCHEMA, False, software, None, None, accept, (), tuple(problems))
    found = _artifacts(contents, problems)
    statuses = {entry.key: contents.status(entry) for entry in contents.manifest.entries}
    devices = tuple(
        _device(place, contents, contents.status_on(place.facts.capability), accept)
        for place in places(contents.manifest, present, target)
    )
    _judge_devices(devices, problems)
    _judge_statuses(devices, contents, statuses, accept, problems)
    _judge_relatives(devices, contents, statuses, problems)
    evidence = _evidence(contents, statuses, problems)
    _compare_with_sources(contents.folder, problems)
    usable = not any(problem.severity == "error" for problem in problems)
    return Diagnosis(SCHEMA, usable, software, found, evidence, accept, devices, tuple(problems))


def open_contents(artifacts: str | os.PathLike[str] | None) -> Contents:
    """The manifest and every record of an artifacts folder. Raises RouterRuntimeError."""
    folder = find_artifacts(artifacts)
    manifest, found = read_manifest(folder), read_evidence(folder)
    return Contents(folder, manifest, Evidence(found.records, found.emulations))


def present_places() -> tuple[Place, ...]:
    """The GPUs of this machine; those that do not differ are one place. Raises DriverError."""
    found: dict[tuple[str, DeviceFacts], list[int]] = {}
    for index in range(driver.device_count()):
        key = driver.device_name(index), driver.device_facts(index)
        found.setdefault(key, []).append(index)
    return tuple(
        Place(name, tuple(indices), None, facts) for (name, facts), indices in found.items()
    )


def places(manifest: Manifest, present: tuple[Place, ...], target: str | None) -> tuple[Place, ...]:
    """The devices to decide for: those present, else one for each compute capability that a target
    of the manifest is made for; or one for each that ``target`` is made for.
    """
    if present and target is None:
        return present
    built = sorted({entry.target for entry in manifest.entries})
    found: dict[tuple[int, int], Place] = {}
    for each in [target] if target else built:
        for capability in Target.parse(each).capabilities:
            name = _imagined_name(each, capability, built)
            found.setdefault(capability, Place(name, (), each, imagined_device(*capability)))
    return tuple(found.values())


def _imagined_name(target: str, capability: tuple[int, int], built: list[str]) -> str:
    """What a device for a target is called. If nothing was built for that target, kernels for
    another one may run there: those for its family.
    """
    name = f"a device for {target}"
    others = [each for each in built if Target.parse(each).runs_on(*capability)]
    if target in built or not others:
        return name
    return f"{name}, on which the kernels for {' and '.join(others)} run"


def _machine(problems: list[Problem]) -> tuple[Software, tuple[Place, ...]]:
    present: tuple[Place, ...] = ()
    version = None
    try:
        number = driver.driver_version()
        version = _cuda(number)
        if number < MINIMUM_DRIVER:
            problems.append(
                Problem(
                    "error",
                    f"the driver is too old: it serves CUDA {version}, "
                    f"CUDA {_cuda(MINIMUM_DRIVER)} is needed",
                    f"install an NVIDIA driver of {DRIVER}",
                )
            )
        present = present_places()
    except RouterRuntimeError as error:
        problems.append(_problem("note", error))
    for place in present:
        if "MIG" in place.name.split():
            problems.append(
                Problem(
                    "note",
                    f"{_where(place.indices)} is a MIG slice with {place.facts.sms} "
                    "multiprocessors: it may not have room for the clusters of every kernel",
                    f"run: {runtime('verify')}, which loads each kernel; or use the whole GPU",
                )
            )
    torch = _version("torch")
    if torch is None:
        problems.append(
            Problem("error", "torch is not installed: there are no Routers", "pip install torch")
        )
    owners = sorted(set(importlib.metadata.packages_distributions().get(_PACKAGE, [])))
    if len(owners) > 1:
        problems.append(
            Problem(
                "error",
                f"{len(owners)} installed wheels share the folder of {_PACKAGE}: "
                f"{', '.join(owners)}",
                f"run: pip uninstall -y {' '.join(owners)} && {REINSTALL}",
            )
        )
    software = Software(
        __version__, sys.version.split()[0], torch, _version("cuda-bindings"), version
    )
    return software, present


def _contents(artifacts: str | os.PathLike[str] | None, problems: list[Problem]) -> Contents | None:
    try:
        return open_contents(artifacts)
    except RouterRuntimeError as error:
        problems.append(_problem("error", error))
        return None


def _artifacts(contents: Contents, problems: list[Problem]) -> Artifacts:
    manifest = contents.manifest
    bad = list(_damaged(contents))
    if bad:
        first = _problem("error", bad[0])
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        problems.append(Problem("error", f"{first.text}{others}", first.next))
    required = trust.policy()
    return Artifacts(
        folder=str(contents.folder.resolve()),
        entries=len(manifest.entries),
        intact=len(manifest.entries) - len(bad),
        signature=None if required is None else str(required),
        source_sha256=manifest.source_sha256,
        toolchain=manifest.toolchain.packages,
    )


def _damaged(contents: Contents) -> Iterator[RouterRuntimeError]:
    """The error of each cubin that is missing, altered or not allowed."""
    for entry in contents.manifest.entries:
        try:
            read_cubin(entry, contents.folder)
        except RouterRuntimeError as error:
            yield error


def _device(
    place: Place, contents: Contents, status_of: Callable[[Entry], str], accept: str | None
) -> Device:
    facts, manifest = place.facts, contents.manifest
    return Device(
        place.name,
        place.indices,
        place.target,
        facts.capability,
        facts.sms,
        facts.shared_memory_per_block_optin,
        router_decisions(manifest, facts, status_of, contents.folder, accept),
        row_op_decisions(manifest, facts, status_of, contents.folder),
    )


def _judge_devices(devices: tuple[Device, ...], problems: list[Problem]) -> None:
    """What is not served on a GPU that is here."""
    for device in devices:
        if not device.indices:
            continue
        where = _where(device.indices)
        unserved: dict[str, list[str]] = {}
        for router in device.routers:
            if router.next is not None:
                unserved.setdefault(router.next, []).append(router.name)
        for row_op in device.row_ops:
            if row_op.next is not None:
                unserved.setdefault(row_op.next, []).append(row_op.kernel)
        for advice, names in unserved.items():
            problems.append(
                Problem("error", f"nothing serves {', '.join(names)} on {where}", advice)
            )


def _judge_statuses(
    devices: tuple[Device, ...],
    contents: Contents,
    statuses: Mapping[str, str],
    accept: str | None,
    problems: list[Problem],
) -> None:
    """How many entries that these devices can load do not serve by default."""
    counts = Counter(
        statuses[entry.key]
        for entry in contents.manifest.entries
        if any(Target.parse(entry.target).runs_on(*device.compute_capability) for device in devices)
    )
    present = any(device.indices for device in devices)
    advice = _record_evidence(contents.folder)
    if not present:
        advice = f"on a GPU of their target, {advice}"
    if counts["emulated"]:
        ways = advice
        text = (
            f"{counts['emulated']} kernels are emulated: their PTX passed the oracle suite with "
            "some instructions in software, and they never ran on a GPU of their target"
        )
        if accept != "emulated":
            text += ", so they serve only a Router that accepts that"
            ways += ", or write Router(..., accept='emulated')"
        problems.append(Problem("note", text, ways))
    if counts["unproven"]:
        problems.append(
            Problem(
                "note",
                f"{counts['unproven']} kernels are unproven: no evidence says that they are right "
                "on a GPU, so they serve only a Router that names their variant",
                advice,
            )
        )


def _judge_relatives(
    devices: tuple[Device, ...],
    contents: Contents,
    statuses: Mapping[str, str],
    problems: list[Problem],
) -> None:
    """Which entries another member of their target's family has verified, and a GPU that is here
    has not.
    """
    for device in devices:
        status_here = contents.status_on(device.compute_capability)
        waiting = sum(
            statuses[entry.key] == "verified"
            and Target.parse(entry.target).runs_on(*device.compute_capability)
            and status_here(entry) != "verified"
            for entry in contents.manifest.entries
        )
        if device.indices and waiting:
            major, minor = device.compute_capability
            problems.append(
                Problem(
                    "note",
                    f"{waiting} kernels are verified on another compute capability of their "
                    f"target's family, and source-verified on {_where(device.indices)}, which has "
                    f"{major}.{minor}",
                    _record_evidence(contents.folder),
                )
            )


def _evidence(
    contents: Contents, statuses: Mapping[str, str], problems: list[Problem]
) -> EvidenceSummary:
    stale = sum(not record.current for record in contents.evidence.records)
    if stale:
        problems.append(
            Problem(
                "note",
                f"{stale} records of evidence are stale: another version of the oracle suite made "
                "them, so they prove nothing",
                f"on a GPU of their target, {_record_evidence(contents.folder)}",
            )
        )
    stale_emulations = sum(not record.current for record in contents.evidence.emulations)
    if stale_emulations:
        problems.append(
            Problem(
                "note",
                f"{stale_emulations} records of emulation are stale: another version of the oracle "
                "suite, or a run in other modes, made them, so they prove nothing",
                record_emulation(),
            )
        )
    _name_strays(contents.folder, problems)
    _judge_sources(contents, statuses, problems)
    counts = Counter(statuses.values())
    return EvidenceSummary(
        tuple(str(folder.resolve()) for folder in folders(contents.folder)),
        {name: counts[name] for name in STATUSES},
        stale + stale_emulations,
    )


def _name_strays(artifacts: Path, problems: list[Problem]) -> None:
    """Which files in the folders of evidence are not read, because no record has such a name."""
    _, strays = files(artifacts)
    if strays:
        more = f" and {len(strays) - _MOST_NAMES} more" if len(strays) > _MOST_NAMES else ""
        problems.append(
            Problem(
                "note",
                "not named as a record of evidence is, so not read: "
                f"{', '.join(map(str, strays[:_MOST_NAMES]))}{more}",
                "keep such files in another folder; a record that was renamed proves nothing",
            )
        )


def _judge_sources(
    contents: Contents, statuses: Mapping[str, str], problems: list[Problem]
) -> None:
    """Which verified cubins have records of other sources than the manifest's, so that cubins of
    other targets, made from the manifest's, are not source-verified.
    """
    entries = contents.manifest.entries
    without = [entry for entry in entries if not serves(statuses[entry.key])]
    changed = []
    for entry in entries:
        if statuses[entry.key] != "verified" or not any(
            (other.kernel, other.source_sha256) == (entry.kernel, entry.source_sha256)
            for other in without
        ):
            continue
        records = [record for record in contents.evidence.records if record.current]
        about = [record for record in records if record.matches(entry)]
        if not any(record.same_sources(entry) for record in about):
            changed.append(entry)
    if changed:
        targets = ", ".join(sorted({entry.target for entry in changed}))
        problems.append(
            Problem(
                "note",
                f"{len(changed)} verified kernels, such as {changed[0].key}, have records of other "
                "sources than the manifest's, though their cubins have the same bytes: kernels of "
                "other targets with the manifest's sources are not source-verified",
                f"on a GPU of {targets}, {_record_evidence(contents.folder)}",
            )
        )


def _compare_with_sources(folder: Path, problems: list[Problem]) -> None:
    """In a checkout: whether its sources are still those that the artifacts were built from."""
    root = checkout()
    changed = () if root is None else changed_since(folder, root)
    if root is None or not changed:
        return
    own = folder.resolve() == root / "artifacts"
    shown = changed[0] + (f" and {len(changed) - 1} more files" if len(changed) > 1 else "")
    problems.append(
        Problem(
            "note",
            f"artifacts differ from the sources: {shown} of this checkout changed since the build",
            build_artifacts() if own else "repeat the build that made them",
        )
    )


def _record_evidence(artifacts: Path) -> str:
    """The command that records evidence where this process can write it and read it again."""
    own = own_folder()
    folder = own or artifacts / EVIDENCE_NAME
    present = next(each for each in (folder, *folder.resolve().parents) if exists(each))
    if os.access(present, os.W_OK) and (own or trust.policy() is None):
        return f"run: {record_evidence(artifacts)}"
    reason = "is read-only" if trust.policy() is None or own else "must hold signed files only"
    return (
        f"run: {record_evidence(artifacts, '--evidence DIR')} && "
        f"export {ENVIRONMENT_VARIABLE}=DIR ({folder} {reason})"
    )


def _problem(severity: Literal["error", "note"], error: RouterRuntimeError) -> Problem:
    """An error as a problem: its text ends with what to do next."""
    text, _, advice = str(error).rpartition("; ")
    return Problem(severity, text, advice) if text else Problem(severity, advice, "")


def _where(indices: tuple[int, ...]) -> str:
    return ", ".join(f"cuda:{index}" for index in indices)


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
