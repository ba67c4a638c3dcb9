"""The two kinds of record, which share a folder: the name of a file says of which kind it is."""

from __future__ import annotations

from collections.abc import Callable

from router_runtime.errors import FormatError
from router_runtime.evidence import emulation_record
from router_runtime.evidence import record as verification_record
from router_runtime.evidence.emulation_record import EmulationRecord
from router_runtime.evidence.record import Record

AnyRecord = Record | EmulationRecord


def is_emulation(name: str) -> bool:
    """Return whether a file of this name has a record of emulation."""
    return name.endswith(emulation_record.SUFFIX)


def dumps(record: AnyRecord) -> bytes:
    """Return the canonical bytes of a record. Raises FormatError if it is not valid."""
    if isinstance(record, EmulationRecord):
        return emulation_record.dumps(record)
    return verification_record.dumps(record)


def loads(name: str, data: bytes) -> AnyRecord:
    """Return the record in a file of this name. Raises FormatError if it is not valid, not of the
    kind that the name says, or if the name is not its own.
    """
    read: Callable[[bytes], AnyRecord] = verification_record.loads
    if is_emulation(name):
        read = emulation_record.loads
    record = read(data)
    if name != record.file_name:
        raise FormatError(f"expected the name {record.file_name}, found {name}")
    return record
