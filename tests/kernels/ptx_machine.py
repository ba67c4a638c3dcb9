"""A CTA that runs the PTX of a CUDA C++ kernel, for tests without a GPU.

It knows the instructions that the kernels under test have, and refuses others. A thread runs alone
until an instruction of the whole warp (a shuffle, an MMA), which its 32 lanes must reach together,
or a barrier of the CTA. An MMA adds exactly and rounds once: give it numbers whose sums are exact.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.kernels.tensor_core import Memory, bf16

WARP = 32
#: Where shared memory begins: its addresses differ from all offsets in it.
SHARED = 0x400

Registers = dict[str, int]
#: What a lane passes to the instruction of its warp, and what it gets back.
Lane = Generator[tuple[Any, ...], Any, None]

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "nan": lambda a, b: a != a or b != b,
}
_WHOLE: Mapping[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "popc": int.bit_count,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "rem": lambda a, b: a % b,
    "div": lambda a, b: a // b,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "bfi": lambda a, b, place, size: (
        b & ~((1 << size) - 1 << place) | (a & (1 << size) - 1) << place
    ),
}
_REAL: Mapping[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)),
    "min": np.fmin,
    "max": np.fmax,
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "div": lambda a, b: a / b,
    "mov": lambda a: a,
}


def real(bits: int) -> np.float32:
    """The number with these bits."""
    return np.float32(struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0])


def bits_of(number: Any) -> int:
    """The bits of a number, rounded to FP32."""
    return int(np.float32(number).view(np.uint32))


class Program:
    """One kernel of a PTX module."""

    def __init__(self, ptx: str) -> None:
        code = re.sub(r"//.*", "", ptx)
        _, _, rest = code.partition(".entry")
        head, _, body = rest.partition("{")
        self.parameters = re.findall(r"\.param \.(\w+) (?:\.(?:ptr|global|align \d+) )*(\w+)", head)
        variables = re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", body)
        self.symbols, self.shared_bytes = {}, 0
        for name, size in variables:
            self.symbols[name] = SHARED + self.shared_bytes
            self.shared_bytes += int(size)
        self.code: list[tuple[str, bool, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        instructions = re.sub(r"^\s*\.(reg|shared|pragma).*", "", body, flags=re.M)
        for text in re.split(r"[;\n]|(?<=:)\s", instructions):
            self._add(text.strip())

    def _add(self, text: str) -> None:
        if text.strip("{}") == "" or text.startswith("."):
            return
        if text.endswith(":"):
            self.labels[text[:-1]] = len(self.code)
            return
        predicate, wanted = "", True
        if found := re.match(r"@(!?)(%p\d+)\s+(.*)", text):
            predicate, wanted, text = found[2], not found[1], found[3]
        name, _, operands = text.partition(" ") if " " in text else text.partition("\t")
        split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
        self.code.append((predicate, wanted, name.strip(), split))


class Block:
    """One CTA of ``program``, of ``threads`` threads."""

    def __init__(self, program: Program, threads: int, memory: Memory) -> None:
        self.program, self.threads, self.memory = program, threads, memory
        self.shared = np.full(program.shared_bytes, 0xFF, np.uint8)  # NaN, until it is written
        self.counts: dict[str, int] = {}

    def run(self, block: int, arguments: Sequence[int | float]) -> None:
        """Run all threads. ``arguments`` are those of the kernel in its order."""
        given = {
            name: bits_of(value) if kind == "f32" else int(value)
            for (kind, name), value in zip(self.program.parameters, arguments, strict=True)
        }
        warps = []
        for warp in range(self.threads // WARP):
            lanes = [self._thread(warp * WARP + lane, block, given) for lane in range(WARP)]
            warps.append((lanes, [None] * WARP))
        waiting = list(warps)
        while waiting:
            at_barrier = [warp for warp in waiting if self._run_warp(*warp)]
            assert not at_barrier or at_barrier == waiting, "a barrier that not all warps reach"
            waiting = at_barrier

    def _run_warp(self, lanes: list[Lane], results: list[Any]) -> bool:
        """Run a warp to the barrier of the CTA, or return False at its end."""
        while True:
            asked: list[Any] = []
            for lane, result in zip(lanes, results, strict=True):
                try:
                    asked.append(lane.send(result))
                except StopIteration:
                    asked.append(None)
            results[:] = [None] * WARP
            if all(each is None for each in asked):
                return False
            alive = [each for each in asked if each is not None]
            assert len({each[:2] for each in alive}) == 1, "lanes of a warp apart"
            kind = alive[0][0]
            if kind == "bar":
                return True
            assert len(alive) == WARP, f"{kind} without all lanes"
            if kind != "warp":
                results[:] = getattr(self, f"_{kind}")([each[2:] for each in asked])

    def _shuffle(self, asked: list[tuple[Any, ...]]) -> list[int]:
        found = []
        for lane, (mode, _, b) in enumerate(asked):
            source = b % WARP if mode == "idx" else lane ^ b
            found.append(asked[source][1])
        return found

    def _redux(self, asked: list[tuple[Any, ...]]) -> list[int]:
        mode, kind, _ = asked[0]
        words = [_typed(each[2], kind[0], 32) for each in asked]
        result = sum(words) if mode == "add" else max(words) if mode == "max" else min(words)
        return [result & 0xFFFFFFFF] * WARP

    def _vote(self, asked: list[tuple[Any, ...]]) -> list[int]:
        assert asked[0][0] == "ballot"
        return [sum(bool(each[2]) << lane for lane, each in enumerate(asked))] * WARP

    def _matrices(self, asked: list[tuple[Any, ...]]) -> list[list[int]]:
        addresses = [each[0] for each in asked]
        assert all(address % 16 == 0 for address in addresses)
        return [
            [self._load_shared(addresses[8 * m + lane // 4] + lane % 4 * 4, 4) for m in range(4)]
            for lane in range(WARP)
        ]

    def _mma(self, asked: list[tuple[Any, ...]]) -> list[list[int]]:
        """m16n8k16, by the fragments of the PTX manual."""
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for lane, (own_a, own_b, own_c) in enumerate(asked):
            row, column = lane // 4, lane % 4 * 2
            for i, pair in enumerate(own_a):
                place = row + i % 2 * 8, slice(column + i // 2 * 8, column + i // 2 * 8 + 2)
                a[place] = bf16(np.array([pair & 0xFFFF, pair >> 16], np.uint16))
            for i, pair in enumerate(own_b):
                b[column + 8 * i : column + 8 * i + 2, row] = bf16(
                    np.array([pair & 0xFFFF, pair >> 16], np.uint16)
                )
            for i, number in enumerate(own_c):
                c[row + i // 2 * 8, column + i % 2] = real(number)
        with np.errstate(invalid="ignore", over="ignore"):
            d = (a @ b + c).astype(np.float32)
        return [
            [bits_of(d[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]) for i in range(4)]
            for lane in range(WARP)
        ]

    def _load_shared(self, address: int, size: int) -> int:
        start = address - SHARED
        assert 0 <= start <= self.program.shared_bytes - size
        assert address % size == 0
        return int.from_bytes(self.shared[start : start + size].tobytes(), "little")

    def _thread(self, thread: int, block: int, given: Mapping[str, int]) -> Lane:
        special = {"%tid.x": thread, "%ctaid.x": block}
        registers: Registers = {}
        program = self.program

        def value(operand: str) -> int:
            if operand in registers:
                return registers[operand]
            if operand.startswith("%"):
                return special[operand]
            if operand.startswith("0f"):
                return int(operand[2:], 16)
            return program.symbols[operand] if operand in program.symbols else int(operand, 0)

        def address(operand: str) -> int:
            base, _, offset = operand.strip("[]").partition("+")
            return value(base) + (int(offset, 0) if offset else 0)

        def several(operand: str) -> list[str]:
            return [name.strip() for name in operand.strip("{}").split(",")]

        at = 0
        while True:
            predicate, wanted, name, operands = program.code[at]
            own = at
            at += 1
            if predicate and bool(registers[predicate]) != wanted:
                continue
            operation, *modifiers = name.split(".")
            self.counts[name] = self.counts.get(name, 0) + 1
            kind = modifiers[-1] if modifiers else ""
            if operation == "bra":
                at = program.labels[operands[0]]
            elif operation in ("ret", "exit"):
                return
            elif operation in ("griddepcontrol", "prefetch"):
                continue
            elif operation == "bar":
                yield ("warp" if "warp" in modifiers else "bar", own)
            elif operation == "shfl":
                target, *_ = operands[0].split("|")
                registers[target] = yield (
                    *("shuffle", own, modifiers[1], value(operands[1])),
                    value(operands[2]),
                )
            elif operation in ("redux", "vote"):
                registers[operands[0]] = yield (
                    *(operation, own, modifiers[1], kind),
                    value(operands[1]),
                )
            elif operation == "ldmatrix":
                found = yield ("matrices", own, address(operands[1]))
                registers.update(zip(several(operands[0]), found, strict=True))
            elif operation == "mma":
                sides = [[value(each) for each in several(part)] for part in operands[1:]]
                found = yield ("mma", own, *sides)
                registers.update(zip(several(operands[0]), found, strict=True))
            elif operation == "ld" and "param" in modifiers:
                registers[operands[0]] = given[operands[1].strip("[]")]
            elif operation == "ld":
                size = _SIZES[kind[1:]]
                where = address(operands[1])
                names = several(operands[0])
                if len(names) > 1:
                    assert where % (size * len(names)) == 0
                for i, target in enumerate(names):
                    word = self._load(modifiers, where + i * size, size)
                    registers[target] = _signed(word, size * 8) if kind[0] == "s" else word
            elif operation == "st":
                size = _SIZES[kind[1:]]
                where = address(operands[0])
                for i, source in enumerate(several(operands[1])):
                    self._store(modifiers, where + i * size, size, value(source))
            elif operation == "setp":
                words = [value(each) for each in operands[1:]]
                compared = [
                    real(word) if kind == "f32" else _typed(word, kind[0], int(kind[1:]))
                    for word in words
                ]
                registers[operands[0]] = int(_COMPARE[modifiers[0]](*compared))
            elif operation == "selp":
                chosen = operands[1 if registers[operands[3]] else 2]
                registers[operands[0]] = value(chosen)
            elif kind == "f32" and operation in _REAL:
                with np.errstate(all="ignore"):
                    result = _REAL[operation](*(real(value(each)) for each in operands[1:]))
                registers[operands[0]] = bits_of(result)
            else:
                registers[operands[0]] = _whole(operation, modifiers, [*map(value, operands[1:])])

    def _load(self, modifiers: list[str], address: int, size: int) -> int:
        if "shared" in modifiers:
            return self._load_shared(address, size)
        assert address % size == 0
        return int.from_bytes(self.memory.part(address, size).tobytes(), "little")

    def _store(self, modifiers: list[str], address: int, size: int, value: int) -> None:
        raw = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if "shared" in modifiers:
            start = address - SHARED
            assert 0 <= start <= self.program.shared_bytes - size
            self.shared[start : start + size] = np.frombuffer(raw, np.uint8)
        else:
            self.memory.part(address, size)[:] = np.frombuffer(raw, np.uint8)


def _signed(word: int, size: int) -> int:
    return word - (1 << size) if word >> (size - 1) & 1 else word


def _typed(word: int, kind: str, size: int) -> int:
    word &= (1 << size) - 1
    return _signed(word, size) if kind == "s" else word


def _whole(operation: str, modifiers: list[str], values: list[int]) -> int:
    """An operation on integers, of the type in the last modifier."""
    kind = modifiers[-1]
    if kind == "pred":
        return _WHOLE[operation](*values) & 1
    size = int(kind[1:])
    places = values[2:] if operation == "bfi" else values[1:] if operation[:2] == "sh" else []
    typed = [_typed(each, kind[0], size) for each in values[: len(values) - len(places)]]
    result = _WHOLE[operation](*typed, *places)
    if operation == "cvt":
        size = int(modifiers[0][1:])
    if "wide" in modifiers:
        size *= 2
    return result & (1 << size) - 1
