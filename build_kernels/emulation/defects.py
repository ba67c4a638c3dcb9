"""Defects to put into a kernel's PTX: they test whether the emulation sees what it is meant to see.

A defect is found by what the instructions do (changes.py), so it is still the same one when the
kernel has been compiled anew. Each names the layer that is expected to see it. Data only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from build_kernels.emulation import changes
from build_kernels.emulation.changes import Code, Edit, Form
from build_kernels.emulation.statements import edited

#: What sees a defect. ``translation``: the translator. ``error``: the model counts an error of the
#: kind that follows the colon. ``bits``: the outputs differ; a mode after the colon is the one in
#: which they are expected to, and is for the reader only. ``none``: nothing does.
Layer = str


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect.

    Attributes:
        name: What is wrong.
        form: The form of the kernel to put it into.
        layer: What is expected to see it.
        edits: Returns the changes of the text; none if the kernel has no such place.

    """

    name: str
    form: Form
    layer: Layer
    edits: Callable[[Code], Sequence[Edit]]

    def inserted(self, code: Code) -> str | None:
        """Return the PTX with the defect, None if the kernel has no place for it."""
        edits = self.edits(code)
        return edited(code.ptx, edits) if edits else None


def _defect(
    name: str, form: Form, layer: Layer, edits: Callable[..., Sequence[Edit]], *args: object
) -> Defect:
    return Defect(f"{name}.{form}", form, layer, lambda code: edits(code, *args))


_HALF, _DOUBLE = "shr.u32 d_bytes, {0}, 1;", "shl.b32 d_bytes, {0}, 1;"

DEFECTS: tuple[Defect, ...] = (
    # Operands and instructions.
    _defect("accumulate_from_start", "once", "bits", changes.other_start, "0", "1"),
    _defect("never_accumulate", "once", "bits", changes.other_start, "1", "0"),
    _defect(
        "weights_stride", "once", "bits", changes.other_descriptor, 1, lambda high: high ^ 0x60
    ),
    _defect("weights_leading", "once", "bits", changes.other_leading),
    _defect(
        "hidden_stride", "turns", "bits", changes.other_descriptor, 2, lambda high: high ^ 0x60
    ),
    _defect(
        "hidden_not_swizzled",
        "once",
        "bits",
        changes.other_descriptor,
        2,
        lambda high: changes.with_swizzle(high, 0),
    ),
    _defect(
        "hidden_64_bytes_swizzled",
        "once",
        "bits",
        changes.other_descriptor,
        2,
        lambda high: changes.with_swizzle(high, 4),
    ),
    _defect(
        "descriptor_version",
        "once",
        "error:descriptor",
        changes.other_descriptor,
        1,
        lambda high: high & ~(7 << 14),
    ),
    _defect("descriptor_not_masked", "once", "bits", changes.unmasked_descriptor),
    _defect("descriptor_not_masked", "turns", "bits", changes.unmasked_descriptor),
    _defect("hidden_step", "once", "bits", changes.other_step),
    _defect(
        "instruction_columns",
        "once",
        "error:unallocated",
        changes.other_instruction,
        lambda i: i + (2 << 17),
    ),
    _defect("instruction_rows", "once", "bits", changes.other_instruction, lambda i: i - (4 << 24)),
    _defect(
        "instruction_types",
        "once",
        "error:instruction",
        changes.other_instruction,
        lambda i: i ^ 1 << 7,
    ),
    # Tensor memory.
    _defect("lanes_of_the_other_half", "once", "error:lane", changes.other_address, 16 << 16),
    _defect("lanes_of_another_warp", "once", "error:lane", changes.other_address, 32 << 16),
    _defect("other_columns", "turns", "bits", changes.other_address, 8),
    _defect(
        "few_columns_allocated",
        "turns",
        "error:unallocated",
        changes.other_columns,
        "tcgen05.alloc.",
        lambda n: n // 2,
    ),
    _defect(
        "odd_columns_allocated",
        "once",
        "error:allocation",
        changes.other_columns,
        "tcgen05.alloc.",
        lambda n: n + 16,
    ),
    _defect(
        "never_given_back", "once", "error:still_allocated", changes.without, "tcgen05.dealloc."
    ),
    _defect(
        "half_given_back",
        "turns",
        "error:still_allocated",
        changes.other_columns,
        "tcgen05.dealloc.",
        lambda n: n // 2,
    ),
    # Waits.
    _defect("no_wait_for_weights", "once", "bits:late", changes.no_wait, "weights_full"),
    _defect("no_wait_for_stages", "turns", "bits:late", changes.no_wait, "stages_full"),
    _defect("no_wait_for_hidden", "once", "bits:late", changes.no_wait, "hidden_full"),
    _defect("no_wait_for_full_sums", "once", "bits:late", changes.no_wait, "sums_full"),
    _defect("no_wait_for_full_sums", "turns", "bits:late", changes.no_wait, "sums_full"),
    _defect("no_wait_for_empty_sums", "turns", "bits:slowed", changes.no_wait, "sums_empty"),
    _defect("no_wait_for_empty_hidden", "turns", "bits:late", changes.no_wait, "hidden_empty"),
    _defect("no_wait_for_empty_weights", "turns", "bits:late", changes.no_wait, "weights_empty"),
    _defect("no_wait_for_loads", "once", "translation", changes.without, "tcgen05.wait::ld"),
    _defect("no_wait_for_loads", "turns", "translation", changes.without, "tcgen05.wait::ld"),
    # Commits and arrivals.
    _defect("no_commit_of_sums", "once", "error:timeout", changes.no_commit, "sums_full"),
    _defect("no_commit_of_hidden", "turns", "error:timeout", changes.no_commit, "hidden_empty"),
    _defect("sums_handed_over_early", "once", "bits:late", changes.arrive_early, "sums_full"),
    _defect("sums_handed_over_early", "turns", "bits:late", changes.arrive_early, "sums_full"),
    _defect("hidden_released_early", "turns", "bits:deep", changes.arrive_early, "hidden_empty"),
    _defect("weights_released_early", "turns", "bits:deep", changes.arrive_early, "weights_empty"),
    _defect("sums_released_by_one_warp", "turns", "bits:slowed", changes.one_warp_releases),
    _defect("sums_released_before_loads", "turns", "bits:slowed", changes.arrive_first),
    _defect("sums_committed_twice", "turns", "error:timeout", changes.commit_twice, "sums_full"),
    _defect(
        "commit_to_itself_only",
        "turns",
        "error:timeout",
        changes.other_mask,
        "tcgen05.commit.",
        changes.OWN_MASK,
    ),
    _defect(
        "commit_beyond_the_cluster",
        "turns",
        "error:mask",
        changes.other_mask,
        "tcgen05.commit.",
        "mov.u16 {0}, 0xff;",
    ),
    _defect(
        "copy_to_itself_only",
        "turns",
        "error:timeout",
        changes.other_mask,
        "cp.async.bulk.",
        changes.OWN_MASK,
    ),
    # Parities and bytes.
    _defect("parity_of_weights", "once", "bits:late", changes.other_parity, "weights_full"),
    _defect("parity_of_sums", "once", "bits:late", changes.other_parity, "sums_full"),
    _defect("parity_of_full_sums", "turns", "bits", changes.other_parity, "sums_full"),
    _defect("parity_of_empty_sums", "turns", "error:timeout", changes.other_parity, "sums_empty"),
    _defect("parity_of_stages", "turns", "bits", changes.other_parity, "stages_full"),
    _defect(
        "too_few_bytes_of_weights", "once", "bits:late", changes.other_bytes, "weights_full", _HALF
    ),
    _defect(
        "too_many_bytes_of_weights",
        "once",
        "error:timeout",
        changes.other_bytes,
        "weights_full",
        _DOUBLE,
    ),
    _defect(
        "too_many_bytes_of_hidden",
        "once",
        "error:timeout",
        changes.other_bytes,
        "hidden_full",
        _DOUBLE,
    ),
    # What no layer sees: the model executes tcgen05 work in order, through ordinary loads, so the
    # tcgen05 fences have nothing to order; it does not model the permit to allocate.
    _defect("no_fence_before", "once", "none", changes.without, "tcgen05.fence::before"),
    _defect("no_fence_after", "once", "none", changes.without, "tcgen05.fence::after"),
    _defect("no_relinquish", "once", "none", changes.without, "tcgen05.relinquish"),
)
