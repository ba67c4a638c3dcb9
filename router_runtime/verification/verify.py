"""``router-runtime verify``: the oracle suite against every cubin that the present device can load.

Kernels are taken from the manifest one by one and launched through their contract, not through the
ops, so that every entry is examined and not only those that the resolver would choose.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.device.artifact_store import EVIDENCE_NAME, read_manifest
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.loader import load_entry
from router_runtime.device.resolve import DeviceFacts
from router_runtime.errors import ArtifactError, DriverError, TrustError, explain
from router_runtime.evidence import cases as suite
from router_runtime.evidence import store as evidence
from router_runtime.evidence.cases import Case
from router_runtime.evidence.store import CaseRecord, Record
from router_runtime.format.manifest import Entry, Manifest, Target
from router_runtime.routing.call import SERVED
from router_runtime.routing.repack import repacked
from router_runtime.trust import policy as trust
from router_runtime.verification.examine import Run, Trial, examine
from router_runtime.verification.inputs import Inputs, make_inputs

Echo = Callable[[str], object]

#: (numerics tag, seed of a case) -> the first entry that ran it, and the digest of its bits.
_Siblings = dict[tuple[str, int], tuple[str, str]]

#: Memory for what entries share, on the host and the device together. The largest model here needs
#: seven tenths of it.
_KEPT_BYTES = 2 * 2**30

_HEADER = ("entry", "cases", "rows", "clear", "reordered", "error/bound", "relative", "s", "result")


class KernelRun:
    """Launches a loaded kernel on the suite's inputs, by the names of its contract."""

    def __init__(self, kernel: LoadedKernel, device: str) -> None:
        self._kernel = kernel
        self._device = device
        # As the contract says: zeroed once, left zeroed where it matters by every launch.
        size = kernel.entry.contract.workspace_bytes
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._weight: object = None
        self._packed: dict[str, Tensor] = {}

    def __call__(self, inputs: Inputs, *outputs: Tensor, **logical_ids: Tensor) -> None:
        values, ids, *rest = outputs
        arguments = self._arguments(inputs)
        arguments |= {"weights_out": values, "values_out": values}
        arguments["logits_out"] = rest[0] if rest else None
        for name, tensor in (
            ("ids_out", ids),
            ("logical_ids_out", logical_ids.get("logical_ids")),
            ("given_ids_i32", inputs.get("given_ids")),
        ):
            wide = isinstance(tensor, Tensor) and tensor.dtype is torch.int64
            arguments[name] = None if wide else tensor
            arguments[f"{name.removesuffix('_i32')}_i64"] = tensor if wide else None
        arguments = dict.fromkeys(SERVED, 0) | {"sentinel": -1, "image_bias": None} | arguments
        arguments["serving"] = int("wide_ids" in inputs)
        arguments |= {"tokens": ids.shape[0], "rows": ids.shape[0], "top_k": ids.shape[1]}
        # An address: a contract may declare the workspace as a pointer to any type.
        arguments["workspace"] = self._workspace.data_ptr()
        unknown = sorted(set(self._kernel.arguments) - set(arguments))
        if unknown:
            raise ArtifactError(
                explain(
                    f"contract of {self._kernel.entry.key}",
                    expected="arguments that the oracle suite has a value for",
                    found=unknown,
                    remedy="teach router_runtime/verification/verify.py their meaning",
                )
            )
        self._kernel.launch(
            self._stream(), **{name: arguments[name] for name in self._kernel.arguments}
        )

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(inputs)
        if isinstance(token_ids := inputs.get("token_ids"), Tensor):
            wide = token_ids.dtype == torch.int64
            arguments["token_ids_i64"] = token_ids if wide else None
            arguments["token_ids_i32"] = None if wide else token_ids
        for name in ("is_padding", "image_mask"):
            if isinstance(mask := inputs.get(name), Tensor):
                arguments[name] = mask.view(torch.uint8)
        if isinstance(expert_map := inputs.get("expert_map"), Tensor):
            arguments["replicas"] = expert_map.shape[1]
        if isinstance(table := inputs.get("table"), Tensor):
            arguments["vocab"] = table.shape[0]
        for name, columns in (
            ("hidden_states", "hidden"),
            ("logits", "experts"),
            ("scores", "row_length"),
        ):
            if isinstance(rows := inputs.get(name), Tensor):
                arguments["row_stride"] = rows.stride(0)
                arguments[columns] = rows.shape[1]
        if isinstance(weight := inputs.get("weight"), Tensor):
            if weight is not self._weight:
                recipes = self._kernel.entry.contract.repacks
                self._packed = {recipe.parameter: repacked(recipe, weight) for recipe in recipes}
                self._weight = weight
            arguments |= self._packed
        return arguments


class _Trials:
    """The trials of the entries that compute the same for the same model, made once for all of
    them: drawing inputs and working out what is expected of them takes longer than the launches.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._of: object = None
        self._kept: dict[object, tuple[Trial, int]] = {}

    def turn_to(self, entry: Entry) -> None:
        """Forget what the entry shares with no other."""
        if self._of != _shared_by(entry):
            self._of = _shared_by(entry)
            self._kept.clear()

    def trial(self, case: Case) -> Trial:
        """Of a case, for any kernel that computes the same."""
        if found := self._kept.get(_identity(case)):
            return found[0]
        return Trial(case, make_inputs(case), self._device)

    def keep(self, trial: Trial) -> None:
        """For later entries, while there is room."""
        key, size = _identity(trial.case), trial.nbytes()
        if size + sum(other for _, other in self._kept.values()) <= _KEPT_BYTES:
            self._kept.setdefault(key, (trial, size))

    def drop(self) -> None:
        """Forget all: a kernel that did wrong may have written anywhere, even into what is kept."""
        self._kept.clear()


def _shared_by(entry: Entry) -> tuple[str, str]:
    """Equal for entries that share cases. They are examined one after the other."""
    return entry.model or "", suite.family(entry.kernel)


def _identity(case: Case) -> object:
    """Equal for cases that have the same inputs and the same launches."""
    fields = dataclasses.asdict(case) | {"kernel": suite.family(case.kernel)}
    return tuple(sorted(fields.pop("sizes").items())), tuple(fields.items())


def run(artifacts: Path, record: bool, echo: Echo, own: Path | None = None) -> bool:
    """Verify every entry that the current device loads; True if there are some and all pass.

    With ``record``, the evidence of an entry that passes is written, and the evidence of one that
    fails is removed: in the folder ``own``, or the one that ``ROUTER_RUNTIME_EVIDENCE`` names, or
    else beside the manifest. Raises ArtifactError at once if that cannot be written.
    """
    manifest = read_manifest(artifacts)
    folder = evidence.own_folder(own) or artifacts / EVIDENCE_NAME
    if record:
        _check_folder(folder, artifacts)
    driver.initialise()
    if not torch.cuda.is_available():
        raise DriverError(
            explain(
                "GPU",
                expected=f"one that torch {torch.__version__} can use",
                found="none",
                remedy="install a torch built for CUDA, or see: router-runtime doctor",
            )
        )
    index = torch.cuda.current_device()
    facts = driver.device_facts(index)
    here = sorted(
        (
            entry
            for entry in manifest.entries
            if Target.parse(entry.target).runs_on(facts.major, facts.minor)
        ),
        key=_shared_by,
    )
    echo(f"{driver.device_name(index)}, {facts}, torch {torch.__version__}")
    echo(f"oracle suite {suite.suite_sha256()[:16]}, {len(here)} entries of {artifacts}")
    if not here:
        echo(
            f"expected an entry for compute capability {facts.major}.{facts.minor}, found none; "
            f"run: build-kernels build --target sm_{facts.major}{facts.minor}a"
        )
        return False
    rows: list[tuple[str, ...]] = [_HEADER]
    failures: list[str] = []
    siblings: _Siblings = {}
    trials = _Trials(f"cuda:{index}")
    for entry in here:
        started = time.perf_counter()
        trials.turn_to(entry)
        problems, found = _verify_entry(entry, manifest, artifacts, index, siblings, trials)
        row = _row(entry, found, time.perf_counter() - started, problems)
        rows.append(row)
        echo(f"{row[-1]:4}  {entry.key}")
        failures += [f"{entry.key}: {problem}" for problem in problems]
        if record:
            _record(entry, manifest, folder, (index, facts), problems, found, echo)
    echo("")
    for line in _table(rows):
        echo(line)
    for failure in failures:
        echo(failure)
    if record and folder.resolve() not in [each.resolve() for each in evidence.folders(artifacts)]:
        echo(
            f"for the runtime to read it: export {evidence.ENVIRONMENT_VARIABLE}={folder.resolve()}"
        )
    return not failures


def _check_folder(folder: Path, artifacts: Path) -> None:
    """Refuse a folder that cannot be written, or in which a record would be refused when read."""
    shipped = artifacts / EVIDENCE_NAME
    if trust.policy() is not None and folder.resolve() == shipped.resolve():
        raise TrustError(
            explain(
                f"evidence in {folder}",
                expected="signed evidence, as this process requires",
                found="a record about to be written beside it",
                remedy="name a folder of your own: --evidence DIR",
            )
        )
    evidence.require_writable(folder)


def _verify_entry(
    entry: Entry,
    manifest: Manifest,
    artifacts: Path,
    index: int,
    siblings: _Siblings,
    trials: _Trials,
) -> tuple[list[str], list[CaseRecord]]:
    """Problems and the record of every case that ran.

    An entry must give the bits of every earlier one with its numerics tag; ``siblings`` has them.
    """
    device = f"cuda:{index}"
    try:
        cases = suite.cases(entry.kernel, entry.constants, entry.contract.limits)
        kernel_run: Run = KernelRun(load_entry(entry, manifest, artifacts, index), device)
    except (RuntimeError, ValueError) as error:
        return [str(error)], []
    limits = entry.contract.limits
    largest = limits.get("tokens", limits.get("rows", (1, 2**31 - 1)))[1]
    logits = any(parameter.name == "logits_out" for parameter in entry.contract.parameters)
    problems: list[str] = []
    found: list[CaseRecord] = []
    for case in cases:
        trial = trials.trial(case)
        try:
            verdict = examine(trial, kernel_run, largest, logits)
        except RuntimeError as error:
            # A CUDA error may be sticky: whatever ran next on this device would fail with it.
            trials.drop()
            return [*problems, f"{case.name}: {type(error).__name__}: {error}"], found
        problems += [f"{case.name}: {problem}" for problem in verdict.problems]
        if verdict.problems:
            trials.drop()
        else:
            trials.keep(trial)
        if entry.numerics is not None:
            # The seed stands for kernels that compute the same, model, sizes and pattern.
            name = (entry.numerics, case.seed)
            sibling, bits = siblings.setdefault(name, (entry.key, verdict.bits_sha256))
            if bits != verdict.bits_sha256:
                problems.append(f"{case.name}: other bits than {sibling} with the same numerics")
        found.append(
            CaseRecord(
                name=case.name,
                seed=case.seed,
                inputs_sha256=trial.inputs_sha256,
                rows=verdict.rows,
                clear=verdict.clear,
                reordered=verdict.reordered,
                ids_sha256=verdict.ids_sha256,
                worst=verdict.worst,
            )
        )
    return problems, found


def _record(
    entry: Entry,
    manifest: Manifest,
    folder: Path,
    device: tuple[int, DeviceFacts],
    problems: list[str],
    found: list[CaseRecord],
    echo: Echo,
) -> None:
    index, facts = device
    record = Record(
        entry=entry.key,
        kernel=entry.kernel,
        constants=entry.constants,
        limits=entry.contract.limits,
        target=entry.target,
        file=entry.file,
        sha256=entry.sha256,
        source_sha256=entry.source_sha256,
        toolchain_sha256=evidence.toolchain_sha256(manifest.toolchain),
        suite_sha256=suite.suite_sha256(),
        device=driver.device_name(index),
        compute_capability=(facts.major, facts.minor),
        driver=facts.driver,
        torch=str(torch.__version__),
        cases=tuple(found),
    )
    if not problems:
        echo(f"      recorded {evidence.write_record(record, folder).name}")
    elif (path := folder / record.file_name).exists():
        path.unlink()
        echo(f"      removed {path.name}: it no longer holds")


def _row(
    entry: Entry, found: list[CaseRecord], seconds: float, problems: list[str]
) -> tuple[str, ...]:
    def worst(name: str) -> str:
        errors = [case.worst[name] for case in found if name in case.worst]
        return f"{max(errors):.2g}" if errors else "exact"

    return (
        entry.key,
        str(len(found)),
        str(sum(case.rows for case in found)),
        str(sum(case.clear for case in found)),
        str(sum(case.reordered for case in found)),
        worst("weight"),
        worst("weight_relative"),
        f"{seconds:.1f}",
        "FAIL" if problems else "pass",
    )


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        name, *numbers = row
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join(cells)
