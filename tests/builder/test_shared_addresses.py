"""What the compiler makes of shared addresses: in a cluster, the upper 8 bits of one hold the CTA's
rank. Adding to it and handing it to instructions is safe; any other arithmetic has to know that.
"""

from __future__ import annotations

import re

from build_kernels.emulation.changes import Code
from build_kernels.emulation.sources import Source
from build_kernels.emulation.statements import Statement
from build_kernels.kernels.common.ptx.tcgen05_layout import ADDRESS_MASK

#: Where the dynamic part of shared memory starts.
_START = re.compile(r"__dynamic_shmem__\w*")
#: What an address may go through and still be one.
_MOVES = ("mov.", "add.", "sub.", "selp.", "mad.lo.", "mapa.")


def addresses(code: Code) -> frozenset[str]:
    """The registers that hold shared addresses."""
    found = {
        s.operands[0]
        for s in code.named("mov.")
        if len(s.operands) == 2 and _START.fullmatch(s.operands[1])
    }
    while True:
        more = {
            s.operands[0]
            for s in code.named(*_MOVES)
            if s.operands[0] not in found and _summands(s) & found
        }
        if not more:
            return frozenset(found)
        found |= more


def _summands(statement: Statement) -> frozenset[str]:
    """The operands that an address can come from: of a product, only what is added."""
    if statement.name.startswith("mad."):
        return frozenset(statement.operands[3:])
    return frozenset(statement.operands[1:3])


def test_a_descriptor_gets_the_bits_of_an_address_that_its_field_has(
    emulated: tuple[Source, ...],
) -> None:
    for source in emulated:
        code = Code(source.ptx)
        made = [*code.issued(1), *code.issued(2)]
        assert made, source.jobs[0].key
        for descriptor in made:
            low, _, _ = descriptor.operands[1].strip("{} ").partition(",")
            steps = [
                (s.name, s.operands[1:])
                for s in code.sources(low.strip(), descriptor.scope)
                if s.start < descriptor.start
            ]
            assert [name for name, _ in steps] == ["shr.u32", "and.b32", "or.b32"]
            (address, shift), masked = steps[0][1], steps[1][1]
            assert address in addresses(code)
            assert shift == "4"
            assert masked == (low.strip(), str(ADDRESS_MASK)), source.jobs[0].key


def test_shared_addresses_enter_no_other_arithmetic(emulated: tuple[Source, ...]) -> None:
    """A shift, a mask, a comparison or a product would see the rank."""
    for source in emulated:
        code = Code(source.ptx)
        held = addresses(code)
        assert held
        descriptors = {s.scope for s in (*code.issued(1), *code.issued(2))}
        for statement in code.statements:
            if statement.kind != "instruction" or statement.name.startswith(_MOVES):
                continue
            # As values: an instruction that takes an address has it in brackets.
            read = {operand for operand in statement.operands[1:] if operand in held}
            where = f"{source.jobs[0].key}, line {statement.line}: {statement.name}"
            assert not read or statement.scope in descriptors, where
