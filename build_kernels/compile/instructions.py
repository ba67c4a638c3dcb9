"""The machine instructions of a cubin: how many of each kind, and what follows from that.

They come from ``nvdisasm``, which takes half a second to start: a build starts it once per target.

Spills are counted in the instructions, so that both compilers are measured alike: the bytes per
thread of all ``STL`` (stores) and of all ``LDL`` (loads), each counted once however often it runs.
Accesses to an array that the compiler had to keep in local memory count too: they cost the same.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.errors import BuildError
from router_runtime.format import elf

#: Instruction, modifiers included -> how often it occurs.
Census = Mapping[str, int]

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
)
_LOCAL = re.compile(r"(LDL|STL)\b")
_WIDTH = re.compile(r"\.(64|128|U8|S8|U16|S16)\b")
_WIDTH_BYTES = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}

#: What ``griddepcontrol.wait`` becomes in machine code.
_DEPENDENCY_WAIT = "ACQBULK"


def sass(data: bytes, nvdisasm: Path) -> str:
    """Return the disassembly as ``nvdisasm``, the program at that path, prints it."""
    return _disassembled(data, ("--print-code",), nvdisasm)


def census(listing: str) -> dict[str, int]:
    """Return the census of a disassembly, sorted by instruction."""
    counts = collections.Counter(instruction for _, instruction in _instructions(listing))
    return dict(sorted(counts.items()))


def censuses(cubins: Sequence[bytes], target: str, nvdisasm: Path) -> list[dict[str, int]]:
    """Return the census of each of these cubins, which are all for ``target``.

    ``nvdisasm`` gets the code of all of them in one piece; the cubin of an
    instruction follows from its address. Raises BuildError if the code cannot be disassembled.
    """
    codes = [_code(data) for data in cubins]
    ends = list(itertools.accumulate(len(code) for code in codes))
    # nvdisasm's analysis of data flow would run across the joined cubins; no count needs it.
    options = ("--binary", target.replace("sm_", "SM"), "--no-dataflow")
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in cubins]
    for address, instruction in _instructions(_disassembled(b"".join(codes), options, nvdisasm)):
        counts[bisect.bisect_right(ends, address)][instruction] += 1
    return [dict(sorted(found.items())) for found in counts]


@dataclass(frozen=True, slots=True)
class TensorCore:
    """How many tcgen05 instructions a kernel has.

    Attributes:
        allocations: Of tensor-memory columns: one that tries, and one more where it waits.
        releases: Of those columns.
        multiplications: MMAs.
        commits: Of MMAs to an mbarrier.
        loads: From tensor memory to registers.

    """

    allocations: int
    releases: int
    multiplications: int
    commits: int
    loads: int


def tensor_core(counts: Census) -> TensorCore:
    """Return the tcgen05 instructions of a census, by their SASS names."""

    def total(pattern: str) -> int:
        return sum(count for name, count in counts.items() if re.match(pattern, name))

    return TensorCore(
        allocations=total(r"UTCATOMSWS\.FIND_AND_SET\b"),
        releases=total(r"UTCATOMSWS\.AND\b"),
        multiplications=total(r"UTC[A-Z0-9]*MMA\b"),
        commits=total(r"UTCBAR\b"),
        loads=total(r"LDTM\b"),
    )


def serialised(counts: Census) -> bool:
    """Return whether ptxas has serialised the wgmma instructions: none overlaps another.

    Each of them then has a ``WARPGROUP.ARRIVE`` of its own, where otherwise several share one. Such
    code is correct but slow, and ptxas reports it only in a log.
    """
    multiplications = sum(count for name, count in counts.items() if name.startswith("HGMMA."))
    return 0 < multiplications <= counts.get("WARPGROUP.ARRIVE", 0)


def waits_for_dependencies(counts: Census) -> bool:
    """Return whether there is a ``griddepcontrol.wait``."""
    return any(instruction.split(".")[0] == _DEPENDENCY_WAIT for instruction in counts)


def spills(counts: Census) -> tuple[int, int]:
    """Return the bytes per thread that are stored to and loaded from local memory."""
    moved = {"LDL": 0, "STL": 0}
    for instruction, count in counts.items():
        match = _LOCAL.match(instruction)
        if match:
            width = _WIDTH.search(instruction)
            moved[match[1]] += count * (_WIDTH_BYTES[width[1]] if width else 4)
    return moved["STL"], moved["LDL"]


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
        raise BuildError(
            f"expected nvdisasm to read the cubin, found: {result.stderr.strip()}; "
            "next: make clean-venv && make build-cubins"
        )
    return result.stdout


def _instructions(listing: str) -> Iterator[tuple[int, str]]:
    """Yield the address and the instruction, modifiers included, of every line that has one."""
    for line in listing.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            yield int(match[1], 16), match[2]


def _code(data: bytes) -> bytes:
    """Return the machine code of the entry function and of the functions that it calls."""
    return b"".join(s.data for s in elf.sections(data, "cubin") if s.name.startswith(".text."))
