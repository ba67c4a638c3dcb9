"""The doctor's report as one plain data object, which the screen and ``--json`` render.

``--json`` prints it with the keys of the dataclasses here and in ``decisions``. They are stable: a
change that a reader could notice raises ``SCHEMA``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from router_runtime.cli.decisions import RouterDecision, RowOpDecision

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong (``error``: the exit code is 1) or worth knowing (``note``)."""

    severity: Literal["error", "note"]
    text: str
    next: str


@dataclass(frozen=True, slots=True)
class Software:
    """Versions; None for what is absent. ``driver`` is the CUDA version that the driver serves."""

    router_runtime: str
    python: str
    torch: str | None
    cuda_bindings: str | None
    driver: str | None


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The artifacts folder. ``intact`` counts the cubins that match their digest. ``signature`` is
    the signature policy, None if no signature is required.
    """

    folder: str
    entries: int
    intact: int
    signature: str | None
    source_sha256: str
    toolchain: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EvidenceSummary:
    """The folders that are read; how many entries have each status (an entry counts with its best
    one on any device of its target); and how many records are stale, so that they prove nothing:
    made with another version of the oracle suite or, for emulation, in other modes.
    """

    folders: tuple[str, ...]
    statuses: Mapping[str, int]
    stale_records: int


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device and what serves there. ``indices`` are the GPUs of this machine that are
    such a device, as torch numbers them; it is empty for a device that is not here and was made up
    for ``target``.
    """

    name: str
    indices: tuple[int, ...]
    target: str | None
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory_per_block: int
    routers: tuple[RouterDecision, ...]
    row_ops: tuple[RowOpDecision, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The whole report. ``accept`` is that of the Routers that are decided for."""

    schema: int
    usable: bool
    software: Software
    artifacts: Artifacts | None
    evidence: EvidenceSummary | None
    accept: str | None
    devices: tuple[Device, ...]
    problems: tuple[Problem, ...]
