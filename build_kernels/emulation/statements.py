"""PTX text -> the statements of its one entry function, each with its place in the text.

A reader, not a compiler: it finds labels, scopes, directives and instructions with guard, opcode
and operands, and changes nothing. Edits are made in the text at the places of the statements.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from build_kernels.errors import BuildError

Kind = Literal["label", "instruction", "directive", "open", "close"]

#: Comments, and the places of instructions in a source, which end with their line.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.loc\b[^\n]*", re.S | re.M)
_ENTRY = re.compile(r"^\s*(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)", re.M)
_LABEL = re.compile(r"([%\w$]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTER = re.compile(r"[%A-Za-z_$][\w$]*")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of PTX.

    Attributes:
        kind: What it is.
        start: Place of its first character in the text.
        end: Place behind its last character, the semicolon included.
        line: Number of its first line, from 1.
        scope: Number of the innermost pair of braces around it; 0 is the function's body.
        name: Of a label, or the opcode of an instruction, modifiers included, or the text of a
            directive.
        guard: ``p`` or ``!p`` of an instruction with ``@p`` or ``@!p``.
        operands: Of an instruction, as they are written.

    """

    kind: Kind
    start: int
    end: int
    line: int
    scope: int
    name: str = ""
    guard: str | None = None
    operands: tuple[str, ...] = ()

    def registers(self) -> frozenset[str]:
        """Return the names of registers, labels and variables in the operands and the guard."""
        text = " ".join((*self.operands, self.guard or ""))
        return frozenset(_REGISTER.findall(text))


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry function of a module: its name and the statements of its body."""

    symbol: str
    statements: tuple[Statement, ...]


def entry(ptx: str) -> Entry:
    """Return the entry function of a module. Raises BuildError if there is not exactly one."""
    # Same length, so that places stay what they are.
    text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), ptx)
    found = _ENTRY.findall(text)
    if len(found) != 1:
        raise BuildError(f"expected PTX with one entry function, found {found}")
    match = _ENTRY.search(text)
    assert match is not None
    body = text.index("{", text.index(")", match.end()))
    return Entry(found[0], tuple(_statements(text, body)))


def operand_list(text: str) -> tuple[str, ...]:
    """Return the operands of an instruction: parts between commas outside brackets and braces."""
    parts, depth, first = [], 0, 0
    for place, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[first:place])
            first = place + 1
    return tuple(part.strip() for part in (*parts, text[first:]) if part.strip())


def edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with each [start, end) replaced. Edits at one place keep their order."""
    parts, place = [], 0
    for start, end, new in sorted(edits, key=lambda edit: (edit[0], edit[1])):
        if start < place:
            raise ValueError(f"expected edits that do not overlap, found two at {start}")
        parts += [text[place:start], new]
        place = end
    return "".join((*parts, text[place:]))


def _statements(text: str, body: int) -> Iterator[Statement]:
    place, line, counted = body + 1, 1, 0
    scopes, opened = [0], 0
    while True:
        while text[place].isspace():
            place += 1
        line += text.count("\n", counted, place)
        counted = place
        here = Statement("open", place, place + 1, line, scopes[-1])
        if text[place] == "{":
            yield here
            opened += 1
            scopes.append(opened)
        elif text[place] == "}":
            scopes.pop()
            if not scopes:
                return
            yield replace(here, kind="close", scope=scopes[-1])
        elif label := _LABEL.match(text, place):
            here = replace(here, kind="label", end=label.end(), name=label[1])
            yield here
        else:
            end = text.index(";", place) + 1
            here = replace(here, end=end)
            yield _statement(here, text[place : end - 1].strip())
        place = here.end


def _statement(here: Statement, text: str) -> Statement:
    if text.startswith("."):
        return replace(here, kind="directive", name=text)
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise BuildError(f"line {here.line}: expected a PTX instruction, found {text[:80]!r}")
    return replace(
        here,
        kind="instruction",
        name=match[2],
        guard=match[1],
        operands=operand_list(match[3]),
    )
