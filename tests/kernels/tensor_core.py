"""A multiprocessor in numpy, the tensor core of sm_100a included, from the PTX manual:
an implementation to compare with, independent of the DSL.

A ``Block`` stands in for the functions of kernels/common while the kernels' own Python runs:
addresses are integers, shared memory is an array of bytes, an mbarrier counts. A wait is that of
Python threads: one that never ends fails the test. Sums are FP32 of small numbers, so exact in any
order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.kernels.common.ptx import tcgen05

#: Where shared memory and its barriers start: stages must work at any multiple of 1024.
BASE = 3 * 1024

#: Bytes between the shared addresses of two blocks of a cluster: an address has the block's rank in
#: its upper 8 bits. Here it is one more, so that an address without a rank shows: it is the own
#: block's, which the hardware would not take.
WINDOW = 1 << 24

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]
Sums = NDArray[np.float32]
Whole = Any  # an integer, or an array of them


def bf16(values: Bits) -> Sums:
    widened: Sums = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def to_bf16(values: Sums) -> Bits:
    """Of numbers that are bf16."""
    cut = values.astype(np.float32).view(np.uint32)
    assert not np.any(cut & 0xFFFF)
    return (cut >> np.uint32(16)).astype(np.uint16)


def operand_address(descriptor: int, row: Whole, k: Whole) -> Whole:
    """Where the tensor core looks for element (row, k) of a K-major bf16 operand.

    The canonical layouts, in elements of 16 bytes: ((8, m), (1, 2)) : ((1, SBO), (1, LBO)) without
    a swizzle, ((8, m), 8) : ((8, SBO), 1) for rows of 128 bytes. The swizzle acts on the final
    address: its bits 4 to 6 are exclusive-ored with bits 7 to 9.
    """
    start, leading = (descriptor & 0x3FFF) * 16, (descriptor >> 16 & 0x3FFF) * 16
    stride, swizzle = (descriptor >> 32 & 0x3FFF) * 16, descriptor >> 61
    assert descriptor >> 46 & 0b111 == 0b001
    assert descriptor >> 49 & 0xFFF == 0
    address = start + row // 8 * stride + k % 8 * 2
    if swizzle == 0:
        return address + row % 8 * 16 + k // 8 * leading
    assert swizzle == 2
    address = address + row % 8 * 128 + k // 8 * 16
    return address ^ (address >> 7 & 0b111) << 4


def assembled(text: str, argument: int) -> int:
    """What a piece of assembly makes of its argument, $1: 32-bit integers, and at the end $0 of the
    lower and the upper half.
    """
    values = {"$1": argument}
    body = text.strip("{} ").split(";")
    for operation, _, operands in (line.strip().partition(" ") for line in body if line.strip()):
        if operation == ".reg":
            continue
        names = [name.strip(" {}") for name in operands.split(",")]
        a, b = (values[n] if n in values else int(n) for n in names[1:])
        results = {"shr.u32": a >> b, "and.b32": a & b, "or.b32": a | b, "mov.b64": a | b << 32}
        values[names[0]] = results[operation]
    return values["$0"]


class Memory:
    """Global memory: arrays at addresses, 2^32 apart."""

    def __init__(self) -> None:
        self.arrays: list[Bytes] = []

    def add(self, array: NDArray[Any]) -> int:
        self.arrays.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return len(self.arrays) << 32

    def part(self, address: int, size: int) -> Bytes:
        found = self.arrays[(address >> 32) - 1][address & 0xFFFFFFFF :][:size]
        assert found.size == size
        return found


#: Seconds after which a wait fails the test.
PATIENCE = 20


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all expected bytes have come."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.left, self.bytes, self.phases = arrivals, arrivals, 0, 0
        self.turn = threading.Condition()
        self.over = False

    def arrive(self, expected: int = 0) -> None:
        with self.turn:
            assert self.left > 0
            self.left -= 1
            self.bytes += expected
            self.settle()

    def receive(self, size: int) -> None:
        with self.turn:
            self.bytes -= size
            self.settle()

    def settle(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left = self.arrivals
            self.phases += 1
            self.turn.notify_all()

    def wait(self, parity: int) -> None:
        """Wait, as the hardware does, until the current phase has the other parity."""
        if self.phases % 2 != parity:
            return
        with self.turn:
            self.turn.wait_for(lambda: self.over or self.phases % 2 != parity, timeout=PATIENCE)
            assert self.phases % 2 != parity, "a wait for what never comes"

    def give_up(self) -> None:
        with self.turn:
            self.over = True
            self.turn.notify_all()


class Block:
    """One CTA of a cluster: what stands in for the modules of kernels/common/ptx while it runs."""

    def __init__(self, cluster: list[Block], memory: Memory, hidden: Bits, box: int) -> None:
        self.cluster, self.memory, self.hidden, self.box = cluster, memory, hidden, box
        self.rank = len(cluster)
        cluster.append(self)
        self.shared: Bytes = np.zeros(228 * 1024, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.tensor: Sums | None = None
        self.tensor_columns = 0
        self.stored: dict[int, int] = {}
        self.here = threading.local()
        #: Barriers of the warps whose lanes are threads, and the named barrier of the consumers.
        self.lanes: dict[int, threading.Barrier] = {}
        self.consumers: threading.Barrier | None = None

    @property
    def base(self) -> int:
        """Where the block's shared memory starts, its rank included."""
        return BASE + (self.rank + 1) * WINDOW

    # --- arithmetic ---
    quotient = staticmethod(lambda a, b: a // b)
    remainder = staticmethod(lambda a, b: a % b)
    min_s32 = staticmethod(min)
    select = staticmethod(lambda condition, a, b: a if condition else b)
    equal = staticmethod(lambda a, b: a == b)
    less = staticmethod(lambda a, b: a < b)
    both = staticmethod(lambda a, b: a and b)
    bits = staticmethod(lambda value: int(np.float32(value).view(np.uint32)))
    from_bits = staticmethod(lambda value: np.uint32(value).view(np.float32))
    add_rn = staticmethod(lambda a, b: np.float32(a) + np.float32(b))

    # --- threads ---
    def sync_warp(self) -> None:
        """Wait for the warp's lanes; nothing for a warp that is one Python thread."""
        if barrier := self.lanes.get(self.here.thread // 32):
            barrier.wait()

    def side_by_side(self, threads: int) -> None:
        """Make barriers for threads that are one Python thread each, per warp and for all."""
        self.consumers = threading.Barrier(threads)
        self.lanes = {warp: threading.Barrier(32) for warp in range(threads // 32)}

    def redux_max_u32(self, value: int) -> int:
        """Return the caller's value for the warp's largest: kernels test only that it is not 0, and
        no lane's value is.
        """
        self.sync_warp()
        return value

    def sync_consumers(self) -> None:
        assert self.consumers is not None
        self.consumers.wait()

    def abandon(self) -> None:
        """End all waits, by breaking the barriers."""
        for barrier in (*self.lanes.values(), self.consumers):
            if barrier is not None:
                barrier.abort()
        for phases in self.barriers.values():
            phases.give_up()

    # --- shared memory ---
    def at(self, address: int, size: int) -> Bytes:
        """Shared memory of any block of the cluster."""
        block = self.cluster[address // WINDOW - 1] if address >= WINDOW else self
        offset = address % WINDOW - BASE
        assert 0 <= offset <= block.shared.size - size
        return block.shared[offset : offset + size]

    def barrier(self, address: int) -> Barrier:
        block = self.cluster[address // WINDOW - 1] if address >= WINDOW else self
        return block.barriers[address % WINDOW]

    def map_shared(self, address: int, rank: int) -> int:
        return address % WINDOW + (rank + 1) * WINDOW

    def load_shared_b32(self, address: int) -> int:
        return int(self.at(address, 4).view(np.uint32)[0])

    def load_shared_f32(self, address: int) -> np.float32:
        found: np.float32 = self.at(address, 4).view(np.float32)[0]
        return found

    def load_shared_f32x2(self, address: int) -> list[np.float32]:
        return list(self.at(address, 8).view(np.float32))

    def load_shared_v4(self, address: int) -> list[int]:
        return [int(word) for word in self.at(address, 16).view(np.uint32)]

    def store_shared_v4(self, address: int, values: Sequence[int]) -> None:
        self.at(address, 16).view(np.uint32)[:] = values

    def store_shared_f32(self, address: int, value: np.float32) -> None:
        self.at(address, 4).view(np.float32)[0] = value

    def store_shared_v2(self, address: int, a: int, b: int) -> None:
        self.at(address, 8).view(np.uint32)[:] = (a, b)

    def store_global_b32(self, address: int, value: int) -> None:
        assert address not in self.stored
        self.stored[address] = value

    def copy_bulk(self, shared: int, address: int, size: int, barrier: int) -> None:
        assert size % 16 == 0
        self.at(shared, size)[:] = self.memory.part(address, size)
        self.barrier(barrier).receive(size)

    def copy_bulk_to_peer(self, remote: int, shared: int, size: int, barrier: int) -> None:
        assert size % 16 == 0
        self.at(remote, size)[:] = self.at(shared, size)
        self.barrier(barrier).receive(size)

    def copy_store_async(self, remote: int, barrier: int, words: Sequence[int]) -> None:
        self.at(remote, 4 * len(words)).view(np.uint32)[:] = words
        self.barrier(barrier).receive(4 * len(words))

    def peers(self, blocks: int) -> list[Block]:
        assert 0 < blocks < 1 << len(self.cluster)
        return [block for block in self.cluster if blocks >> block.rank & 1]

    def copy_bulk_multicast(
        self, shared: int, address: int, size: int, barrier: int, blocks: int
    ) -> None:
        for block in self.peers(blocks):
            place, counted = (block.map_shared(each, block.rank) for each in (shared, barrier))
            block.copy_bulk(place, address, size, counted)

    def copy_tile_multicast(
        self, shared: int, tensor_map: int, x: int, y: int, barrier: int, blocks: int
    ) -> None:
        for block in self.peers(blocks):
            place, counted = (block.map_shared(each, block.rank) for each in (shared, barrier))
            block.copy_tile(place, tensor_map, x, y, counted)

    def copy_tile(self, shared: int, tensor_map: int, x: int, y: int, barrier: int) -> None:
        """A box of 64 elements by ``box`` rows; rows beyond the matrix arrive as zeros."""
        assert shared % 1024 == 0
        for row in range(self.box):
            line = np.zeros(64, np.uint16)
            if y + row < len(self.hidden):
                line = self.hidden[y + row, x : x + 64]
            for chunk in range(8):
                place = shared + row * 128 + (chunk ^ row % 8) * 16
                self.at(place, 16).view(np.uint16)[:] = line[chunk * 8 : chunk * 8 + 8]
        self.barrier(barrier).receive(self.box * 128)

    # --- barriers ---
    def barrier_init(self, address: int, arrivals: int) -> None:
        assert address % 8 == 0
        assert address // WINDOW in (0, self.rank + 1)
        place = address % WINDOW
        assert 0 <= place - BASE <= self.shared.size - 8
        assert place not in self.barriers
        self.barriers[place] = Barrier(arrivals)

    def barrier_arrive_expect_tx(self, address: int, size: int) -> None:
        self.barrier(address).arrive(size)

    def barrier_wait(self, address: int, parity: int) -> None:
        self.barrier(address).wait(parity)

    def barrier_wait_first(self, address: int) -> None:
        self.barrier_wait(address, 0)

    def barrier_arrive(self, address: int) -> None:
        self.barrier(address).arrive()

    barrier_arrive_remote = barrier_arrive

    # --- tensor memory ---
    def allocate(self, shared: int, columns: int) -> None:
        assert columns in (32, 64, 128, 256, 512)
        assert self.tensor is None
        self.tensor = np.full((128, 512), np.nan, np.float32)
        self.tensor_columns = columns
        self.at(shared, 4).view(np.uint32)[0] = 0

    def deallocate(self, address: int, columns: int) -> None:
        assert (address, columns) == (0, self.tensor_columns)
        self.tensor = None

    def operand(self, base: int, address: int) -> int:
        assert address % 16 == 0
        return assembled(tcgen05.operand_assembly(base), address)

    def mma(self, accumulator: int, a: int, b: int, instruction: int, accumulate: bool) -> None:
        assert self.tensor is not None
        n, m = (instruction >> 17 & 0x3F) * 8, (instruction >> 24 & 0x1F) * 16
        fp32, bf16_a, bf16_b = 1 << 4, 1 << 7, 1 << 10
        assert instruction & 0x1FFFF == fp32 | bf16_a | bf16_b
        assert instruction >> 29 == 0
        assert m == 128
        assert accumulator >> 16 == 0
        assert accumulator + n <= self.tensor_columns
        product = self.matrix(a, m) @ self.matrix(b, n).T
        target = self.tensor[:, accumulator : accumulator + n]
        target[:] = target + product if accumulate else product

    def matrix(self, descriptor: int, rows: int) -> Sums:
        places = (
            operand_address(descriptor, np.arange(rows)[:, None], np.arange(16)[None, :]) - BASE
        )
        assert places.min() >= 0
        return bf16(self.shared.view(np.uint16)[places // 2])

    def commit(self, barrier: int) -> None:
        self.barrier_arrive(barrier)

    def commit_multicast(self, barrier: int, blocks: int) -> None:
        for block in self.peers(blocks):
            block.barrier_arrive(block.map_shared(barrier, block.rank))

    def load(self, address: int, columns: int) -> list[np.float32]:
        """For the thread that ``here`` names: 16 lanes x 256 bits, again and again."""
        assert self.tensor is not None
        warp, lane = divmod(self.here.thread, 32)
        first, column = address >> 16, address & 0xFFFF
        assert first % 16 == 0
        assert first // 32 == warp % 4, "a warp reaches 32 lanes of its own"
        assert column + columns <= self.tensor_columns
        return [
            self.tensor[
                first + lane // 4 + 8 * (i // 2 % 2), column + 8 * (i // 4) + 2 * (lane % 4) + i % 2
            ]
            for i in range(columns // 2)
        ]

    def add(self, address: int, columns: int, sums: Sequence[np.float32]) -> list[np.float32]:
        return [a + b for a, b in zip(sums, self.load(address, columns), strict=True)]

    @staticmethod
    def nothing(*_: object) -> None:
        """Do nothing: fences and other instructions that only order memory accesses."""

    fence_before = fence_after = relinquish = nothing
    barrier_fence_init = copy_fence_async_shared = nothing

    @staticmethod
    def read_now(value: np.float32) -> np.float32:
        return value


def together(cluster: Sequence[Block], tasks: Sequence[Callable[[], None]]) -> None:
    """Run all tasks at once. Raises the first task's error and ends the waits of the others."""
    failures: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)
            for block in cluster:
                block.abandon()

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    processors = os.sched_getaffinity(0)
    # Threads inherit it: Python runs one at a time, and handing over to another processor costs
    # more than what most of them do in between.
    os.sched_setaffinity(0, {min(processors)})
    try:
        for thread in threads:
            thread.start()
    finally:
        os.sched_setaffinity(0, processors)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def exact(rows: Sequence[int], generator: np.random.Generator) -> Sums:
    """Small integers and halves: bf16, and every sum of a few thousand products is exact."""
    return (generator.integers(-8, 9, tuple(rows)) / 2).astype(np.float32)
