"""The sections of a cubin, which is a 64-bit little-endian ELF file."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from router_runtime.errors import FormatError

#: ``e_machine`` of a cubin.
_EM_CUDA = 190

#: Section types (``sh_type``).
SHT_NULL, SHT_SYMTAB, SHT_NOTE, SHT_NOBITS = 0, 2, 7, 8


@dataclass(frozen=True, slots=True)
class Section:
    """One section. ``kind`` is ``sh_type``, ``link`` the index of the section that it refers to.
    ``data`` is empty for a section without bytes in the file, whose ``size`` may still be more.
    """

    name: str
    kind: int
    size: int
    link: int
    data: bytes


def sections(data: bytes, where: str) -> list[Section]:
    """Return the sections of a cubin in the order of their indices.

    Raises FormatError, starting with ``where``, if ``data`` is another kind of file or cut off, and
    struct.error, LookupError or ValueError if its tables are damaged.
    """
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != _EM_CUDA:
        raise FormatError(f"{where}: expected a cubin (64-bit CUDA ELF), found {data[:6]!r}...")
    segments, table = struct.unpack_from("<QQ", data, 32)
    segment_size, segment_count, entry_size, count, names_index = struct.unpack_from(
        "<5H", data, 54
    )
    if len(data) < segments + segment_size * segment_count:
        raise FormatError(f"{where}: expected a whole cubin, found one cut off at {len(data)}")
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + entry_size * i) for i in range(count)
    ]
    names_offset, names_size = headers[names_index][4], headers[names_index][5]
    names = data[names_offset : names_offset + names_size]
    found = []
    for name, kind, _flags, _address, offset, size, link, _info, _align, _entry in headers:
        content = b"" if kind in (SHT_NULL, SHT_NOBITS) else data[offset : offset + size]
        if kind not in (SHT_NULL, SHT_NOBITS) and len(content) != size:
            raise FormatError(f"{where}: expected a whole cubin, found one cut off at {len(data)}")
        found.append(Section(string(names, name), kind, size, link, content))
    return found


def string(table: bytes, offset: int) -> str:
    """Return the zero-terminated string at ``offset`` of a string table."""
    return table[offset : table.index(0, offset)].decode("ascii")
