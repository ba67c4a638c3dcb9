"""What a cubin says about itself: symbol, parameters, target, registers, memory, instructions.

A cubin is an ELF file for machine 190. The facts come from its symbol table, from the attribute
records in ``.nv.info`` and ``.nv.info.<symbol>``, and from ``.note.nv.tkinfo``, the only place that
tells ``sm_100a`` from ``sm_100f``. Instructions come from ``nvdisasm``, which takes half a second
to start: a build asks it once a target.

Spills are read off the instructions, so that both compilers are measured alike: the bytes per
thread of all ``STL`` (stores) and all ``LDL`` (loads), each counted once however often it runs.
Accesses to an array that the compiler had to keep in local memory count too: they cost the same.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import os
import re
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.errors import BuildError
from router_runtime.format.manifest import Resources

_EM_CUDA = 190

#: From compute capability 9.0 on, a block's shared memory starts with this much for the system, and
#: the section's size has it. A device's limits do not count it.
RESERVED_SHARED_MEMORY = 1024

_SHT_NOTE, _SHT_SYMTAB = 7, 2
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

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
)
_ARCH = re.compile(r"(?:^|\s)-arch[= ](sm_\w+)")
_LOCAL = re.compile(r"(LDL|STL)\b")
_WIDTH = re.compile(r"\.(64|128|U8|S8|U16|S16)\b")
_WIDTH_BYTES = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True, slots=True)
class Cubin:
    """The facts of one cubin. Optional ones are None where the compiler recorded no bound."""

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


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    size: int
    link: int
    data: bytes


def read(data: bytes, where: str) -> Cubin:
    """Parse a cubin. Raises BuildError, starting with ``where``, if it is not one this project
    ships: one entry function, machine code only, for a named target.
    """
    try:
        return _read(data, where)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise BuildError(
            f"{where}: expected a whole cubin, found a damaged one ({error})"
        ) from error


def sass(data: bytes, nvdisasm: Path) -> str:
    """The disassembly, as ``nvdisasm`` prints it."""
    return _disassembled(data, ("--print-code",), nvdisasm)


def census(listing: str) -> dict[str, int]:
    """Instruction, modifiers included -> how often it stands in the listing."""
    counts = collections.Counter(instruction for _, instruction in _instructions(listing))
    return dict(sorted(counts.items()))


def censuses(cubins: Sequence[bytes], target: str, nvdisasm: Path) -> list[dict[str, int]]:
    """The census of each of these cubins for one target. ``nvdisasm`` gets the code of all in one
    piece, and an instruction counts for the cubin at whose place it stands.
    """
    codes = [_code(data) for data in cubins]
    ends = list(itertools.accumulate(len(code) for code in codes))
    # Data flow does not end where a cubin does; nothing that is counted depends on it.
    options = ("--binary", target.replace("sm_", "SM"), "--no-dataflow")
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in cubins]
    for address, instruction in _instructions(_disassembled(b"".join(codes), options, nvdisasm)):
        counts[bisect.bisect_right(ends, address)][instruction] += 1
    return [dict(sorted(found.items())) for found in counts]


@dataclass(frozen=True, slots=True)
class TensorCore:
    """What a listing has of the tensor core with its own memory (sm_100a, sm_103a), which
    instructions stand for it: ``allocations`` of columns (a try, and one more where it waits),
    ``releases`` of them, ``multiplications``, ``commits`` of those to an mbarrier, ``loads``."""

    allocations: int
    releases: int
    multiplications: int
    commits: int
    loads: int


def tensor_core(counts: Mapping[str, int]) -> TensorCore:
    """The tensor-core facts of an instruction census."""

    def total(pattern: str) -> int:
        return sum(count for name, count in counts.items() if re.match(pattern, name))

    return TensorCore(
        allocations=total(r"UTCATOMSWS\.FIND_AND_SET\b"),
        releases=total(r"UTCATOMSWS\.AND\b"),
        multiplications=total(r"UTC[A-Z0-9]*MMA\b"),
        commits=total(r"UTCBAR\b"),
        loads=total(r"LDTM\b"),
    )


def serialised(counts: Mapping[str, int]) -> bool:
    """Whether ptxas lets no wgmma overlap another: then each has a barrier of its own, not one for
    several. It compiles such code, right and slow, and says so only in a log."""
    multiplications = sum(count for name, count in counts.items() if name.startswith("HGMMA."))
    return 0 < multiplications <= counts.get("WARPGROUP.ARRIVE", 0)


def resources(cubin: Cubin, counts: Mapping[str, int]) -> Resources:
    """The manifest's resource record for a cubin with this instruction census."""
    moved = {"LDL": 0, "STL": 0}
    for instruction, count in counts.items():
        match = _LOCAL.match(instruction)
        if match:
            width = _WIDTH.search(instruction)
            moved[match[1]] += count * (_WIDTH_BYTES[width[1]] if width else 4)
    return Resources(
        registers=cubin.registers,
        spill_stores=moved["STL"],
        spill_loads=moved["LDL"],
        local_memory=cubin.local_memory,
        static_shared_memory=cubin.static_shared_memory,
    )


def _disassembled(image: bytes, options: Sequence[str], nvdisasm: Path) -> str:
    # A file without a name: nothing is left behind, however this process ends.
    with os.fdopen(os.memfd_create("cubin"), "wb") as file:
        file.write(image)
        file.flush()
        result = subprocess.run(
            [nvdisasm, *options, f"/proc/self/fd/{file.fileno()}"],
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise BuildError(f"expected nvdisasm to read the cubin, found: {result.stderr.strip()}")
    return result.stdout


def _instructions(listing: str) -> Iterator[tuple[int, str]]:
    """Address and instruction, modifiers included, of every line that has one."""
    for line in listing.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            yield int(match[1], 16), match[2]


def _code(data: bytes) -> bytes:
    """The machine code of the entry function and of whatever it calls."""
    return b"".join(s.data for s in _sections(data, "cubin") if s.name.startswith(".text."))


def _read(data: bytes, where: str) -> Cubin:
    sections = _sections(data, where)
    embedded = [section.name for section in sections if "ptx" in section.name]
    if embedded:
        raise BuildError(f"{where}: expected machine code only, found PTX in {embedded}")
    entries = _entry_functions(sections)
    if len(entries) != 1:
        names = sorted(name for _, name in entries)
        raise BuildError(f"{where}: expected exactly one entry function, found {names}")
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
        raise BuildError(f"{where}: expected a register count for {symbol}, found none")
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


def _sections(data: bytes, where: str) -> list[_Section]:
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != _EM_CUDA:
        raise BuildError(f"{where}: expected a cubin (64-bit CUDA ELF), found {data[:6]!r}...")
    segments, table = struct.unpack_from("<QQ", data, 32)
    segment_size, segment_count, entry_size, count, names_index = struct.unpack_from(
        "<5H", data, 54
    )
    if len(data) < segments + segment_size * segment_count:
        raise BuildError(f"{where}: expected a whole cubin, found one cut off at {len(data)}")
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + entry_size * i) for i in range(count)
    ]
    no_bits = 8
    names_offset, names_size = headers[names_index][4], headers[names_index][5]
    names = data[names_offset : names_offset + names_size]
    sections = []
    for name, kind, _flags, _address, offset, size, link, _info, _align, _entry in headers:
        content = b"" if kind in (0, no_bits) else data[offset : offset + size]
        if kind not in (0, no_bits) and len(content) != size:
            raise BuildError(f"{where}: expected a whole cubin, found one cut off at {len(data)}")
        sections.append(_Section(_string(names, name), kind, size, link, content))
    return sections


def _entry_functions(sections: list[_Section]) -> list[tuple[int, str]]:
    found = []
    for table in sections:
        if table.kind == _SHT_SYMTAB:
            names = sections[table.link].data
            for index in range(table.size // 24):
                name, info, other = struct.unpack_from("<IBB", table.data, index * 24)
                if info & 0xF == _STT_FUNC and other & _STO_CUDA_ENTRY:
                    found.append((index, _string(names, name)))
    return found


def _tool_and_target(sections: Mapping[str, _Section], where: str) -> tuple[str, str]:
    note = sections.get(".note.nv.tkinfo")
    if note is None or note.kind != _SHT_NOTE:
        raise BuildError(f"{where}: expected a .note.nv.tkinfo section, found none")
    owner, _size, _type = struct.unpack_from("<III", note.data)
    body = note.data[12 + -(-owner // 4) * 4 :]
    # The note's version, five string offsets (the first is of an empty string), the strings.
    _, name, version, _, arguments = (
        _string(body[24:], offset) for offset in struct.unpack_from("<5I", body, 4)
    )
    match = _ARCH.search(arguments)
    if match is None:
        raise BuildError(f"{where}: expected -arch in .note.nv.tkinfo, found {arguments!r}")
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


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(0, offset)].decode("ascii")
