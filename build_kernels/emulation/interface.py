"""The names and numbers that the device functions (model.cu) and the runner on the GPU share.

Imports nothing that compiles: the runner has torch and no toolchain.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What a mode chooses, one bit each. The first four choose when asynchronous work happens: hardware
#: may do it at any of these moments. The last two choose what memory holds and where it is
#: allocated. A correct kernel gives the same result under every combination.
#:
#: - LATE_MMA: MMAs run at the commit that covers them, not where they are issued.
#: - DEEP_MMA: MMAs and commits run when their warp has to wait for something else.
#: - LATE_COPY: a copy from global memory begins when a thread waits for its mbarrier.
#: - SLOW: random delays of MMAs, of loads, of all asynchronous copies, and between the arrivals of
#:   one commit.
#: - POISON: shared memory holds NaN at entry.
#: - HIGH_COLUMNS: tensor memory is allocated from its end.
FLAGS: Mapping[str, int] = {
    "LATE_MMA": 1,
    "DEEP_MMA": 2,
    "LATE_COPY": 4,
    "SLOW": 8,
    "POISON": 16,
    "HIGH_COLUMNS": 32,
}

#: The modes that the runner knows: name -> flags.
MODES: Mapping[str, tuple[str, ...]] = {
    "eager": ("POISON",),
    "late": ("LATE_MMA", "LATE_COPY", "POISON"),
    "deep": ("LATE_MMA", "DEEP_MMA", "POISON", "HIGH_COLUMNS"),
    "slowed": ("LATE_MMA", "SLOW", "POISON", "HIGH_COLUMNS"),
}

#: What is counted, by index in ``tc_counts``.
COUNTS: tuple[str, ...] = (
    "mmas",
    "commits",
    "arrivals",
    "loads",
    "stores",
    "allocations",
    "deallocations",
    "late_copies",
    "most_queued",
)

#: Errors, by index in ``tc_counts`` after the counts. Any of them fails a run.
ERRORS: Mapping[str, str] = {
    "allocation": "columns allocated or given back that cannot be",
    "unallocated": "tensor memory used that the CTA has not allocated",
    "descriptor": "a malformed descriptor of an operand",
    "instruction": "a malformed descriptor of an instruction",
    "lane": "a load or store of another warp's lanes",
    "shared": "an operand outside the CTA's shared memory",
    "mask": "a commit to CTAs outside the cluster",
    "diverged": "an instruction for a whole warp without all its threads",
    "queued": "tensor memory given back before the warp's MMAs are complete",
    "timeout": "a wait that does not end",
    "still_allocated": "tensor memory not given back at the end",
    "still_queued": "MMAs that nothing waited for at the end",
    "unawaited": "copies that nothing waited for at the end",
}

#: Those that the host finds after a launch; the device functions count the others.
FOUND_BY_HOST = ("still_allocated", "still_queued", "unawaited")

#: Sizes of the model's tables. A multiprocessor has 128 lanes x 512 columns of tensor memory.
SIZES: Mapping[str, int] = {"MULTIPROCESSORS": 160, "WARPS": 64, "QUEUE": 96, "COPIES": 96}

#: Words that say where an error of a kind happened first: CTA (x, y, z), thread, three words that
#: depend on the kind, and the rank of the CTA in its cluster.
PLACE_WORDS = 8


def mode(name: str) -> int:
    """Return the bits of the mode ``name``."""
    return sum(FLAGS[flag] for flag in MODES[name])


def constants() -> dict[str, int]:
    """Return the macros that model.cu is compiled with."""
    found = {f"MODE_{name}": value for name, value in FLAGS.items()}
    found |= {f"COUNT_{name.upper()}": index for index, name in enumerate(COUNTS)}
    found |= {f"ERROR_{name.upper()}": len(COUNTS) + index for index, name in enumerate(ERRORS)}
    found |= SIZES
    return found | {"FIRST_ERROR": len(COUNTS), "ERRORS": len(ERRORS), "PLACE_WORDS": PLACE_WORDS}
