"""The folder of ``build-kernels tune``: candidates, and beside them what serves today.

Its manifest is an ordinary one. ``tuning.json`` says which entries are to be compared with each
other, for which batches, and which candidates were left out and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from pathlib import Path

from build_kernels import plan, publish
from build_kernels.build import Progress, compile_all, examine
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.models import MODELS, Model
from build_kernels.compile import toolchain
from build_kernels.compile.job import Job
from build_kernels.compile.sources import PACKAGE
from build_kernels.contracts import declared
from build_kernels.digests import Sources
from build_kernels.errors import BuildError, JobError, unknown
from build_kernels.failures import report
from build_kernels.out_folder import EMULATION_NAME, require_ours, require_room
from build_kernels.plan import Selection
from build_kernels.reuse import INPUTS_NAME, Reuse, inputs_text
from build_kernels.tuning.candidates import Given, candidates, classes, division_text
from build_kernels.tuning.record import REFERENCE, TUNING_NAME, Trial, Tuning
from router_runtime.evidence.choice import DENSE
from router_runtime.format.codec import canonical_json
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry, Manifest


def make(
    models: Sequence[Model],
    out: Path,
    target: str,
    tokens: Set[int],
    count: int,
    given: Sequence[Given],
    processes: int,
    progress: Progress,
    reuse: Sequence[Path] = (),
) -> tuple[Tuning, Manifest]:
    """Build candidates for some models, and what they are compared with, into the folder ``out``.

    Args:
        models: Of the catalog or of model files.
        out: A new folder, or one of an earlier call, which is replaced.
        target: What to build for.
        tokens: Only the classes of these batches; empty: all.
        count: Candidates of each class.
        given: Divisions that are candidates in any case.
        processes: The most worker processes at a time.
        progress: Called for each job that has ended.
        reuse: Build folders whose cubins may be used again.

    Raises:
        BuildError: A name or batch that nothing has, a foreign folder, or one of today's kernels
            does not compile.

    """
    tools = toolchain.check()
    _require_ours(out)
    own = tuple(model for model in models if model not in MODELS)
    names = tuple(model.name for model in models if model in MODELS)
    selection = Selection((target,), names, DENSE, own)
    today = selection.jobs()
    kernels = [kernel for kernel in catalog.KERNELS if kernel.name in DENSE]
    _check_given(kernels, models, target, tokens, given)
    trials, jobs, dropped = _planned(kernels, models, today, target, tokens, count, given)
    compared = {(trial.kernel, trial.model, trial.today) for trial in trials}
    today = [
        job
        for job in today
        if job.kernel == REFERENCE or (job.kernel, job.model, job.variant) in compared
    ]
    with publish.locked(out):
        require_room(out, [*today, *jobs])
        made = _built(today, jobs, Reuse((out, *reuse), tools), processes, progress, dropped)
        entries = tuple(sorted((entry for entry, _ in made), key=lambda entry: entry.key))
        kept = {entry.key for entry in entries}
        tuning = Tuning(
            target,
            Latencies(PACKAGE / "catalog" / "latency.toml").tokens,
            tuple(models),
            tuple(_with(trial, kept, target) for trial in trials),
            dropped,
        )
        manifest = Manifest(plan.tree_digest(), tools, entries)
        by_key = {job.key: job for job in (*today, *jobs)}
        notes = {
            INPUTS_NAME: inputs_text((by_key[entry.key], entry) for entry in entries),
            TUNING_NAME: canonical_json(tuning),
        }
        publish.publish(out, manifest, {entry.file: data for entry, data in made}, notes)
    return tuning, manifest


def _require_ours(out: Path) -> None:
    if require_ours(out, EMULATION_NAME) is not None and not (out / TUNING_NAME).is_file():
        raise BuildError(
            f"expected {out} to be a new folder or one of build-kernels tune, found a build; "
            f"nothing was changed there; next: --out {out / 'tune'}"
        )


def _check_given(
    kernels: Sequence[Kernel],
    models: Sequence[Model],
    target: str,
    tokens: Set[int],
    given: Sequence[Given],
) -> None:
    """Raise BuildError for a model or a number of tokens that is not tuned."""
    found = [variant for kernel in kernels for variant in classes(kernel, target, frozenset())]
    known = sorted({batch for variant in found for batch in variant.batches})
    chosen = [
        batch
        for kernel in kernels
        for variant in classes(kernel, target, tokens)
        for batch in variant.batches
    ]
    options: tuple[tuple[str, Iterable[int], list[int]], ...] = (
        ("--classes", sorted(tokens), known),
        ("--division", [each.tokens for each in given], chosen),
    )
    for name, wanted, able in options:
        for batch in wanted:
            if batch not in able:
                raise BuildError(
                    f"{name}: expected tokens of a class that is tuned for {target}, some of "
                    f"{sorted(able)}, found {batch}; next: name one of them"
                )
    for each in given:
        names = [model.name for model in models]
        if each.model is not None and each.model not in names:
            raise unknown("model of --division", each.model, names, "next: name one of them")


def _planned(
    kernels: Sequence[Kernel],
    models: Sequence[Model],
    today: Sequence[Job],
    target: str,
    tokens: Set[int],
    count: int,
    given: Sequence[Given],
) -> tuple[list[Trial], list[Job], dict[str, str]]:
    """What to compare, the jobs of the candidates, and the given divisions that are refused."""
    sources = Sources(PACKAGE)
    trials: list[Trial] = []
    jobs: list[Job] = []
    dropped: dict[str, str] = {}
    for model in models:
        for kernel in kernels:
            variants: list[Variant] = []
            for each in classes(kernel, target, tokens):
                now = _serving(
                    [job for job in today if (job.kernel, job.model) == (kernel.name, model.name)],
                    each,
                )
                known = None if now is None else now.constants
                found, refused = candidates(each, model, known, count, given)
                names = [*([] if now is None else [now.variant]), *(new.name for new in found)]
                trials.append(
                    Trial(
                        model.name,
                        kernel.name,
                        each.name,
                        each.batches,
                        None if now is None else now.variant,
                        tuple(names),
                    )
                )
                variants += found
                dropped |= refused
            several = dataclasses.replace(kernel, variants=tuple(variants))
            jobs += plan.jobs_of(several, [model], [target], sources)
    return trials, jobs, dropped


def _serving(today: Sequence[Job], variant: Variant) -> Job | None:
    """Which of a model's kernels of today serves the batches of a class: the class itself, or if
    the model has none, the fastest other one with the same MMA by its figures.
    """
    (tokens,) = variant.batches[-1:]
    able = [
        (job.variant != variant.name, dict(job.latency)[tokens], job)
        for job in today
        if job.constants.get("MMA") == variant.constants["MMA"] and tokens in dict(job.latency)
    ]
    return min(able, key=lambda item: item[:2], default=(None, None, None))[2]


def _built(
    today: Sequence[Job],
    jobs: Sequence[Job],
    reuse: Reuse,
    processes: int,
    progress: Progress,
    dropped: dict[str, str],
) -> list[tuple[Entry, bytes]]:
    """The entries and cubins. ``dropped`` gets the candidates that cannot be built, or spill."""
    may_fail = {job.key for job in jobs}
    sound, failures = _sound(jobs)
    compiled, more = compile_all([*today, *sound], reuse, processes, progress, keep_going=True)
    made, refused = examine(compiled, processes)
    failures += [*more, *refused]
    serious = [failure for failure in failures if failure.key not in may_fail]
    if serious:
        raise BuildError(f"{report(serious)}\n\nnothing was published; next: correct the sources")
    dropped |= {failure.key: failure.text for failure in failures}
    kept = []
    for entry, data in made:
        spilled = entry.resources.spill_stores + entry.resources.spill_loads
        if spilled and entry.key in may_fail:
            dropped[entry.key] = f"expected no spills, found {spilled} bytes a thread"
        else:
            kept.append((entry, data))
    return kept


def _sound(jobs: Sequence[Job]) -> tuple[list[Job], list[JobError]]:
    """The jobs with a contract, and the errors of the others."""
    sound, failures = [], []
    for job in jobs:
        try:
            declared(job)
        except JobError as error:
            failures.append(error)
        else:
            sound.append(job)
    return sound, failures


def _with(trial: Trial, kept: Collection[str], target: str) -> Trial:
    """The trial without the candidates that were left out."""
    prefix = f"{trial.kernel}/{trial.model}/{target}"
    entries = tuple(name for name in trial.entries if f"{prefix}/{name}" in kept)
    return dataclasses.replace(trial, entries=entries)


def text(tuning: Tuning, constants: Callable[[str], Constants]) -> str:
    """Return a line for each trial's entries with their divisions, and one for each left out."""
    lines = []
    for trial in tuning.trials:
        lines.append(f"{trial.model} {trial.kernel}, {_listed(trial.tokens)} tokens:")
        for name in trial.entries:
            found = constants(f"{trial.kernel}/{trial.model}/{tuning.target}/{name}")
            lines.append(f"  {name:16} {division_text(found)}")
    lines += [f"left out: {key}: {why}" for key, why in tuning.dropped.items()]
    return "\n".join(lines)


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens))
