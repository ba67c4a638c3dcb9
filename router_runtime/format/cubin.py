"""What a cubin says about itself: symbol, parameters, target, registers, memory.

The facts come from the ELF symbol table, from the attribute records in ``.nv.info`` and
``.nv.info.<symbol>``, and from ``.note.nv.tkinfo``, which names the target: ``sm_100a`` differs
from ``sm_100f`` only there and in ``.nv.compat``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from router_runtime.errors import FormatError
from router_runtime.format import elf

#: From compute capability 9.0 on, the first bytes of a CTA's shared memory belong to the system: a
#: section's size includes them, a device's limits do not.
RESERVED_SHARED_MEMORY = 1024

#: Symbol table: ``st_info`` of a function, and the ``st_other`` bit of a kernel.
_STT_FUNC, _STO_CUDA_ENTRY = 2, 0x10

# Attribute records: (format, attribute, payload). Formats 1-3 carry two bytes, 4 a sized payload.
_FORMAT_SIZED = 4
_ATTR_MAX_THREADS = 0x05
_ATTR_REQUIRED_THREADS = 0x10
_ATTR_FRAME_SIZE = 0x11
_ATTR_MIN_STACK_SIZE = 0x12
_ATTR_PARAMETER = 0x17
_ATTR_REGISTERS = 0x2F
_ATTR_CLUSTER = 0x3D

_ARCH = re.compile(r"(?:^|\s)-arch[= ](sm_\w+)")


@dataclass(frozen=True, slots=True)
class Cubin:
    """The facts of one cubin.

    Attributes:
        symbol: The name of its one kernel.
        target: The architecture that it was compiled for, such as sm_90a.
        tool: The assembler and its version.
        parameters: Offset and size of each kernel parameter, in bytes.
        registers: Per thread.
        local_memory: Bytes per thread.
        static_shared_memory: Bytes per CTA.
        max_threads: The most threads that a CTA may have; None: no bound was recorded.
        required_block: The only allowed CTA shape; None: any.
        required_cluster: The only allowed cluster shape in CTAs; None: any.

    """

    symbol: str
    target: str
    tool: str
    parameters: tuple[tuple[int, int], ...]
    registers: int
    local_memory: int
    static_shared_memory: int
    max_threads: int | None
    required_block: tuple[int, int, int] | None
    required_cluster: tuple[int, int, int] | None


def read(data: bytes, where: str) -> Cubin:
    """Return the facts of a cubin.

    Raises FormatError, starting with ``where``, if it is not one that this project ships: one entry
    function, machine code only, for a named target.
    """
    try:
        return _read(data, where)
    except FormatError:
        raise
    except (struct.error, LookupError, ValueError) as error:
        raise FormatError(
            f"{where}: expected a whole cubin, found a damaged one ({error})"
        ) from error


def _read(data: bytes, where: str) -> Cubin:
    sections = elf.sections(data, where)
    embedded = [section.name for section in sections if "ptx" in section.name]
    if embedded:
        raise FormatError(f"{where}: expected machine code only, found PTX in {embedded}")
    entries = _entry_functions(sections)
    if len(entries) != 1:
        names = sorted(name for _, name in entries)
        raise FormatError(f"{where}: expected exactly one entry function, found {names}")
    index, symbol = entries[0]
    by_name = {section.name: section for section in sections}
    tool, target = _tool_and_target(by_name, where)
    shared = by_name.get(f".nv.shared.{symbol}")
    own = list(_attributes(by_name[f".nv.info.{symbol}"].data))
    # The module's records name the function that each value is for by its symbol index.
    module: dict[int, int] = {}
    for attribute, payload in _attributes(by_name[".nv.info"].data):
        if attribute in (_ATTR_REGISTERS, _ATTR_FRAME_SIZE, _ATTR_MIN_STACK_SIZE):
            function, value = struct.unpack_from("<II", payload)
            if function == index:
                module[attribute] = value
    if _ATTR_REGISTERS not in module:
        raise FormatError(f"{where}: expected a register count for {symbol}, found none")
    threads = _extents(own, _ATTR_MAX_THREADS)
    return Cubin(
        symbol=symbol,
        target=target,
        tool=tool,
        parameters=_parameters(own),
        registers=module[_ATTR_REGISTERS],
        local_memory=max(module.get(_ATTR_FRAME_SIZE, 0), module.get(_ATTR_MIN_STACK_SIZE, 0)),
        static_shared_memory=max(0, shared.size - RESERVED_SHARED_MEMORY) if shared else 0,
        max_threads=threads[0] * threads[1] * threads[2] if threads else None,
        required_block=_extents(own, _ATTR_REQUIRED_THREADS),
        required_cluster=_extents(own, _ATTR_CLUSTER),
    )


def _entry_functions(sections: list[elf.Section]) -> list[tuple[int, str]]:
    found = []
    for table in sections:
        if table.kind == elf.SHT_SYMTAB:
            names = sections[table.link].data
            for index in range(table.size // 24):
                name, info, other = struct.unpack_from("<IBB", table.data, index * 24)
                if info & 0xF == _STT_FUNC and other & _STO_CUDA_ENTRY:
                    found.append((index, elf.string(names, name)))
    return found


def _tool_and_target(sections: Mapping[str, elf.Section], where: str) -> tuple[str, str]:
    note = sections.get(".note.nv.tkinfo")
    if note is None or note.kind != elf.SHT_NOTE:
        raise FormatError(f"{where}: expected a .note.nv.tkinfo section, found none")
    owner, _size, _type = struct.unpack_from("<III", note.data)
    body = note.data[12 + -(-owner // 4) * 4 :]
    # The note's version, five string offsets (the first is of an empty string), the strings.
    _, name, version, _, arguments = (
        elf.string(body[24:], offset) for offset in struct.unpack_from("<5I", body, 4)
    )
    match = _ARCH.search(arguments)
    if match is None:
        raise FormatError(f"{where}: expected -arch in .note.nv.tkinfo, found {arguments!r}")
    release = version.rsplit(",", 1)[-1].strip()
    return f"{name} {release}", match[1]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == _FORMAT_SIZED:
            yield attribute, data[position : position + size]
            position += size
        else:
            yield attribute, struct.pack("<H", size)


def _parameters(records: list[tuple[int, bytes]]) -> tuple[tuple[int, int], ...]:
    found = {}
    for attribute, payload in records:
        if attribute == _ATTR_PARAMETER:
            _index, ordinal, offset, packed = struct.unpack_from("<IHHI", payload)
            found[ordinal] = (offset, packed >> 18)
    return tuple(found[ordinal] for ordinal in sorted(found))


def _extents(records: list[tuple[int, bytes]], wanted: int) -> tuple[int, int, int] | None:
    for attribute, payload in records:
        if attribute == wanted:
            x, y, z = struct.unpack_from("<III", payload)
            return (x, y, z)
    return None
