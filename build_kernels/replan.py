"""What makes the entries of a finished build today, with these sources."""

from __future__ import annotations

from collections.abc import Sequence

from build_kernels.catalog import kernels as catalog
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
    """The models of entries that are not in the catalog. What no kernel is compiled for (scale,
    hash layers, vocabulary) is not known, and of no influence on a job.
    """
    known = {None, *(model.name for model in MODELS)}
    found: dict[str, Model] = {}
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
    return list(found.values())
