"""What a build makes: catalog rows x models x targets, narrowed by the command line.

A ``Job`` is one cubin to be compiled. Its ``source_sha256`` covers everything that goes into the
cubin except the target and the packages of the toolchain, so entries of two targets made from the
same sources have the same (``digests.py`` says what counts).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_kernels import contracts, digests, divisions
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.measured import latency_of
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.rules import check_catalog, check_distinct
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile.job import Job
from build_kernels.compile.languages import LANGUAGES
from build_kernels.compile.sources import PACKAGE
from build_kernels.digests import Sources
from build_kernels.errors import BuildError, unknown
from build_kernels.kernels.common.numerics import CONSTANTS
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry


@dataclass(frozen=True, slots=True)
class Selection:
    """What a build is narrowed to.

    Attributes:
        targets: Only these. Empty: the default targets.
        models: Only these models of the catalog, and all ``extra_models``. If this is empty: only
            ``extra_models``; if those are empty too, every model of the catalog. Kernels that serve
            every model are always included.
        kernels: Only these. Empty: all.
        extra_models: Models that are not in the catalog.

    """

    targets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    extra_models: tuple[Model, ...] = ()

    @property
    def partial(self) -> bool:
        """Return whether this is anything but the full plan."""
        return self != Selection()

    def check(self) -> None:
        """Raise BuildError for a name that is not known, a model file's name that another model
        has, and a row of the catalog that breaks a rule.
        """
        check_catalog()
        _known("target", self.targets, TARGETS)
        known_models = [*(model.name for model in MODELS), *(m.name for m in self.extra_models)]
        check_distinct("models", known_models, "give each model file another name")
        _known("model", self.models, known_models, ", or --model-file")
        _known("kernel", self.kernels, [kernel.name for kernel in catalog.KERNELS])

    def jobs(self) -> list[Job]:
        """Return the jobs of this build in the order of their keys.

        Raises BuildError as ``check`` does, and for a kernel without its files or a model that a
        kernel cannot be compiled for.
        """
        self.check()
        sources = Sources(PACKAGE)
        jobs: list[Job] = []
        for kernel in catalog.KERNELS:
            if not self.kernels or kernel.name in self.kernels:
                models = self._models() if kernel.per_model else [None]
                jobs += jobs_of(kernel, models, self.targets or DEFAULT_TARGETS, sources)
        return sorted(jobs, key=lambda job: job.key)

    def covers(self, entry: Entry) -> bool:
        """Return whether a build of this selection replaces the entry, or removes it."""
        return (
            (not self.kernels or entry.kernel in self.kernels)
            and entry.target in (self.targets or DEFAULT_TARGETS)
            and (entry.model is None or entry.model in {model.name for model in self._models()})
        )

    def _models(self) -> list[Model]:
        wanted = {*self.models, *(model.name for model in self.extra_models)}
        known = (*MODELS, *self.extra_models)
        return [model for model in known if not wanted or model.name in wanted]


def _known(what: str, found: Iterable[str], known: Collection[str], other: str = "") -> None:
    for name in found:
        if name not in known:
            remedy = f"next: .venv/bin/python -m build_kernels list{other}"
            raise unknown(what, name, known, remedy)


def plan(
    *,
    targets: Iterable[str] = (),
    models: Iterable[str] = (),
    kernels: Iterable[str] = (),
    extra_models: Iterable[Model] = (),
) -> list[Job]:
    """Return the jobs of a selection, see ``Selection``."""
    return Selection(tuple(targets), tuple(models), tuple(kernels), tuple(extra_models)).jobs()


def tree_digest() -> str:
    """Return the digest of all that this commit can build: of every job of the catalog, for every
    target, and of the toolchain's lock.

    A kernel for which there is no plan counts as such, so that others can be built beside it.
    """
    facts = [digests.digest([(PACKAGE / "toolchain.lock").read_text(encoding="ascii")])]
    sources = Sources(PACKAGE)
    for kernel in sorted(catalog.KERNELS, key=lambda kernel: kernel.name):
        models = MODELS if kernel.per_model else (None,)
        try:
            jobs = list(jobs_of(kernel, models, TARGETS, sources))
        except BuildError:
            facts.append(f"{kernel.name}: no plan")
        else:
            facts += sorted(f"{job.key} {job.source_sha256} {job.latency}" for job in jobs)
    return digests.digest(facts)


def files_digest() -> str:
    """Return the digest of the bytes of every file that a build reads: a build compares it to see
    that the sources stay as they are while it runs.
    """
    files = {
        path.relative_to(PACKAGE).as_posix(): path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".toml", ".lock")
    }
    return digests.files_digest(files)


def sources(jobs: Iterable[Job]) -> set[Path]:
    """Return the files that decide what these jobs give: their kernels' sources and contracts, the
    catalog, and the toolchain's lock.
    """
    digester = Sources(PACKAGE)
    found = {PACKAGE / "toolchain.lock", PACKAGE / "catalog" / "latency.toml"}
    found.add(PACKAGE / "divisions.py")
    found |= {PACKAGE / "kernels/dense/geometry" / f"{name}.py" for name in ("cost", "search")}
    found |= {
        PACKAGE / "catalog" / f"{name}.py" for name in ("kernels", "measured", "models", "targets")
    }
    for kernel, language in {(job.kernel, job.language) for job in jobs}:
        found |= digester.files(kernel, language)
    return found


def jobs_of(
    kernel: Kernel, models: Iterable[Model | None], targets: Iterable[str], sources: Sources
) -> Iterator[Job]:
    """Yield the jobs of one kernel, for each of the models that has it.

    Raises BuildError as ``Selection.jobs`` does.
    """
    latencies = Latencies(PACKAGE / "catalog" / "latency.toml")
    identity = sources.identity(kernel.name, kernel.language)
    exact = sources.exact(kernel.name, kernel.language)
    flags = json.dumps(LANGUAGES[kernel.language].flags)
    for model in models:
        for variant, constants in _variants(kernel, model):
            given = json.dumps(constants, sort_keys=True, allow_nan=False)
            source_sha256 = digests.digest([identity, given, flags])
            for target in dict.fromkeys(targets):
                if variant.targets and target not in variant.targets:
                    continue
                name = model.name if model else None
                own = () if model is None else latency_of(model, target, kernel.name, variant.name)
                latency = own or latencies.of(kernel.name, variant.name, name, target)
                if not latency and "FORM" in constants:
                    latency = divisions.predicted(constants, target, latencies.tokens)
                yield Job(
                    kernel=kernel.name,
                    language=kernel.language,
                    model=name,
                    target=target,
                    variant=variant.name,
                    constants=constants,
                    source_sha256=source_sha256,
                    inputs_sha256=digests.digest([exact, given, flags, target]),
                    latency=latency,
                )


def _variants(
    kernel: Kernel, model: Model | None
) -> Iterator[tuple[Variant, dict[str, int | float | str]]]:
    """The variants that ``model`` has, each with its division, and all constants of the cubin; a
    more specific source replaces a general one.
    """
    known = dict(CONSTANTS) if kernel.scores else {}
    divided: Mapping[str, Constants] = {}
    if model is not None and not kernel.names(model):
        divided = {**divisions.searched(kernel, model), **divisions.stated(kernel, model)}
    for variant in kernel.variants:
        merged: dict[str, int | float | str] = {**known, **variant.constants_of(model)}
        if variant.name in divided:
            merged |= divided[variant.name]
        elif not variant.has(model):
            continue
        where = f"kernel {kernel.name}" + (f", model {model.name}" if model else "")
        # What is not stated. None: the contract says that the model has no such variant.
        derived = contracts.derived(kernel.name, where, merged)
        if derived is not None:
            yield variant, dict(sorted({**derived, **merged}.items()))
