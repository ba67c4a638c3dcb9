"""What makes the entries of a finished build today, with these sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import COLUMNS
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.targets import TARGETS
from build_kernels.compile.job import Job
from build_kernels.errors import BuildError
from build_kernels.plan import Selection
from router_runtime.format.manifest import Entry


def jobs_of(entries: Sequence[Entry]) -> dict[str, Job]:
    """Return the job of each of these entries by key; those that cannot be built are left out.

    A model that is not in the catalog came from a model file: its shape is in the entries.
    """
    found: dict[str, Job] = {}
    kernels = {kernel.name for kernel in catalog.KERNELS}
    known = {model.name for model in MODELS}
    keys = {entry.key for entry in entries}
    for kernel in sorted({entry.kernel for entry in entries} & kernels):
        own = [entry for entry in entries if entry.kernel == kernel and entry.target in TARGETS]
        selection = Selection(
            targets=tuple(sorted({entry.target for entry in own})),
            models=tuple(sorted({entry.model for entry in own if entry.model in known} - {None})),
            kernels=(kernel,),
            extra_models=tuple(_model_files(own)),
        )
        try:
            found |= {job.key: job for job in selection.jobs() if job.key in keys}
        except BuildError:  # this kernel's sources are wrong; the others have a plan
            continue
    return found


def _model_files(entries: Sequence[Entry]) -> list[Model]:
    """The models of entries that are not in the catalog, with the divisions and the latencies of
    their entries, which a model file may have stated. What no kernel is compiled for (scale, hash
    layers, vocabulary) is not known, and of no influence on a job.
    """
    known = {None, *(model.name for model in MODELS)}
    found: dict[str, Model] = {}
    measured: dict[str, dict[str, int | float]] = {}
    for entry in entries:
        hidden, experts, top_k = (
            entry.constants.get(name) for name in ("HIDDEN", "EXPERTS", "TOP_K")
        )
        if (
            entry.model is not None
            and entry.model not in known
            and isinstance(hidden, int)
            and isinstance(experts, int)
            and isinstance(top_k, int)
        ):
            found[entry.model] = Model(entry.model, hidden, experts, top_k, 1.0, 0, 1)
            measured.setdefault(entry.model, {}).update(_measured(entry))
    return [
        dataclasses.replace(model, measured=tuple(sorted(measured[name].items())))
        for name, model in found.items()
    ]


def _measured(entry: Entry) -> Iterator[tuple[str, int | float]]:
    """The division and the latency of a dense entry, as a model file has them."""
    form, name = str(entry.constants.get("FORM")), f"{entry.kernel}/{entry.variant}"
    dense = {f"{row.name}/{each.name}" for row in catalog.KERNELS for each in row.variants}
    if form not in COLUMNS or name not in dense:
        return
    for constant in COLUMNS[form]:
        value = entry.constants.get(constant)
        if isinstance(value, int):
            yield f"divisions/{name}/{form}/{constant}", value
    for tokens, figure in entry.latency:
        yield f"latency/{entry.target}/{name}/{tokens}", figure
