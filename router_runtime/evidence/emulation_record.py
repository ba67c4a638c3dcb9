"""A record of emulation: the PTX of an entry passed the oracle suite on a GPU that lacks some of
its instructions, which functions stood in for.

The builder makes a cubin of that PTX for such a GPU (``build_kernels/emulation``), and its runner
writes the record; nothing else does. The record is about the entry's own cubin, which did not run:
the machine code, its timing and the rounding of the instructions in question remain unproven. So it
makes an entry ``emulated``, which is less than ``source-verified``, and the entry serves only if
the caller accepts that.

Targets whose PTX differs in the ``.target`` line alone share one run, which gives a record for the
cubin of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from router_runtime.errors import FormatError
from router_runtime.evidence.record import (
    Examined,
    require_digests,
    require_runs_on,
    require_text,
    validate_examined,
)
from router_runtime.format.codec import canonical_json, decode, parse_json
from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target

EMULATION_FORMAT_VERSION = 1
#: How the names of these records end; those of the other kind end in ``.json`` alone.
SUFFIX = ".emulated.json"

#: The modes of a run: the choices of when asynchronous work happens under which every case must
#: pass. A record of others is stale.
MODES = ("eager", "late", "deep", "slowed")


@dataclass(frozen=True, slots=True)
class EmulationRecord(Examined):
    """One entry whose PTX ran on a device that is not of its target.

    ``sha256`` and ``file`` are those of the entry's cubin, which did not run. ``cases`` are the
    results in mode ``deep``, the only one that also reruns cases with their rows rearranged; the
    other modes gave the same bits.

    Attributes:
        ptx_sha256: Digest of the entry's PTX without its ``.target`` line.
        model_sha256: Digest of the sources that translate the PTX and stand in for instructions.
        ptxas: Version of the assembler that made the cubin that ran.
        ran_target: Target of the cubin that ran.
        ran_sha256: Digest of the cubin that ran.
        modes: The modes in which every case passed.
        kind: Tells this kind of record from the other.
        format_version: Of the file.

    """

    ptx_sha256: str
    model_sha256: str
    ptxas: str
    ran_target: str
    ran_sha256: str
    modes: tuple[str, ...]
    kind: Literal["emulation"] = "emulation"
    format_version: int = EMULATION_FORMAT_VERSION

    @property
    def current(self) -> bool:
        """Return whether the record was made with the suite as it is now, in the modes of now."""
        return self.of_this_suite and self.modes == MODES

    @property
    def file_name(self) -> str:
        """Return the name under which the record is stored."""
        return f"{self.stem}{SUFFIX}"

    def concerns(self, entry: Entry) -> bool:
        """Return whether the record is about this cubin."""
        return self.sha256 == entry.sha256


def dumps(record: EmulationRecord) -> bytes:
    """Return the canonical bytes of a record. Raises FormatError if it is not valid."""
    validate(record)
    return canonical_json(record)


def loads(data: bytes) -> EmulationRecord:
    """Return the record in a file's bytes. Raises FormatError for everything that the schema does
    not allow, and for a current record without all cases of the suite.
    """
    document = parse_json(data, "evidence of an emulation")
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != EMULATION_FORMAT_VERSION or isinstance(found, bool):
        raise FormatError(
            "expected evidence of an emulation of format version "
            f"{EMULATION_FORMAT_VERSION}, found {found!r}"
        )
    record: EmulationRecord = decode(EmulationRecord, document, "evidence of an emulation")
    validate(record)
    return record


def validate(record: EmulationRecord) -> None:
    """Raise FormatError if a record breaks a rule that its types do not express."""
    require_digests((record.ptx_sha256, record.model_sha256, record.ran_sha256))
    require_text("ptxas", record.ptxas)
    if not record.modes or len(set(record.modes)) != len(record.modes):
        raise FormatError(f"evidence: expected distinct modes, found {list(record.modes)}")
    require_runs_on(record.ran_target, record)
    if Target.parse(record.target).runs_on(*record.compute_capability):
        raise FormatError(
            f"evidence: expected an emulation on a device that does not run {record.target}, found "
            f"compute capability {record.compute_capability}"
        )
    validate_examined(record)
