"""``topk_indices``: the places of the largest scores of long, ragged rows, for a sparse-attention
indexer. It also serves the rows of ``topk_select`` that the kernel of that name does not take.

Which variant of the kernel serves a call decides how long it takes and never what it returns. A
variant that gives a row to more CTAs reads the row faster and starts more slowly, so few long rows
go to large clusters and many rows to single CTAs. The host knows the columns and not the lengths of
the rows, which may change from replay to replay of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry
from router_runtime.routing.checks import (
    MAX_ROW_LENGTH,
    MAX_SELECTED,
    check_int,
    check_score_rows,
    wrong_tensor,
    wrong_value,
)
from router_runtime.routing.placement import CPU, Placement
from router_runtime.routing.row_kernels import RowKernel, RowKernelUse, row_kernel

#: Measured on an H200 (build_kernels/kernels/topk_indices/NOTES.md). Microseconds that a launch
#: takes beside reading the scores, where one CTA has a row: streamed, held; what each doubling of
#: the CTAs of a row adds, and how many doublings do.
_START_US, _HELD_START_US, _DOUBLING_US, _DOUBLINGS = 5.0, 4.0, 1.6, 3.0
#: More where the streamed form has too few scores to choose a bound by.
_UNBOUNDED_US = 12.0
#: Bytes a microsecond that a CTA reads, and that all of them read together.
_CTA_RATE, _HELD_CTA_RATE, _MEMORY_RATE = 48e3, 80e3, 3650e3
#: Clusters of this size and more leave one multiprocessor in 16 idle: the last ones of a GPC make
#: no whole cluster.
_LARGE_CLUSTER = 4


def estimated_us(
    constants: Constants, rows: int, columns: int, score_bytes: int, multiprocessors: int
) -> float:
    """Microseconds that a variant is expected to take for rows of which all columns are read.

    Args:
        constants: The entry's: ``BLOCKS_PER_ROW``, the CTAs of a cluster, ``BLOCKS_PER_SM``, the
            CTAs that are resident on a multiprocessor, and ``HELD``, 0 in the streamed form, which
            has ``THREADS`` in a CTA that read ``LOADS`` vectors of 16 bytes first.
        rows: Of the call.
        columns: Of the call.
        score_bytes: The size of a score.
        multiprocessors: Of the device.

    """
    blocks_per_row, per_sm = int(constants["BLOCKS_PER_ROW"]), int(constants["BLOCKS_PER_SM"])
    clusters = multiprocessors * per_sm // blocks_per_row
    if blocks_per_row >= _LARGE_CLUSTER:
        clusters = clusters * 15 // 16
    clusters = max(clusters, 1)
    resident = min(clusters, rows) * blocks_per_row
    share = columns * score_bytes / blocks_per_row
    start, cta_rate = _HELD_START_US, _HELD_CTA_RATE
    if not constants["HELD"]:
        start, cta_rate = _START_US, _CTA_RATE
        if share < 16 * int(constants["THREADS"]) * int(constants["LOADS"]):
            start += _UNBOUNDED_US
    start += _DOUBLING_US * min(math.log2(blocks_per_row), _DOUBLINGS)
    read = share / min(cta_rate, _MEMORY_RATE / resident)
    return math.ceil(rows / clusters) * (start + read)


def choose(entries: Sequence[Entry], sizes: tuple[int, ...], multiprocessors: int) -> Entry:
    """Return the entry with the least estimated time; of equals, the one that holds the fewest
    scores in registers, then the first. Pure.

    Args:
        entries: Those that serve the call.
        sizes: Of the call: bytes of a score, rows, columns, k.
        multiprocessors: Of the device.

    """
    score_bytes, rows, columns, _ = sizes
    return min(
        entries,
        key=lambda entry: (
            estimated_us(entry.constants, rows, columns, score_bytes, multiprocessors),
            entry.constants["HELD"],
        ),
    )


#: The kernel as ``topk_indices`` and ``topk_select`` use it.
USE = RowKernelUse(
    "topk_indices",
    arguments=(
        *("scores", "row_starts", "row_ends", "page_table", "requests", "offsets"),
        *("values_out", "ids_out", "slots_out", "rows", "row_length", "row_stride", "top_k"),
        *("page_rows", "page_columns", "page_stride", "page_size", "sorted", "nan_first"),
    ),
    quantities=("rows", "row_length", "top_k"),
    constants=("SCORE_BYTES",),
    choose=choose,
)


@dataclass(slots=True, eq=False)
class Options:
    """The arguments of one call of ``topk_indices`` beside its scores and k; ``topk_indices`` in
    ``ops/functions.py`` says what each means.
    """

    row_starts: Tensor | None = None
    row_ends: Tensor | None = None
    page_table: Tensor | None = None
    page_size: int = 1
    requests: Tensor | None = None
    offsets: Tensor | None = None
    sorted: bool = False
    nan_first: bool = False

    @property
    def maps(self) -> bool:
        """Whether slots are other numbers than ids."""
        return self.page_table is not None or self.offsets is not None

    def check(self, scores: Tensor) -> None:
        """Make every tensor contiguous where the kernel needs it. Raises InputError for one that
        does not fit the scores.
        """
        rows, device = scores.shape[0], scores.device
        for name in ("row_starts", "row_ends", "requests", "offsets"):
            setattr(self, name, _checked_vector(name, getattr(self, name), rows, device))
        check_int("page_size", self.page_size, 1, 2**31 - 1)
        table = self.page_table
        if table is None:
            for name, given in (
                ("requests", self.requests is not None),
                ("page_size", self.page_size != 1),
            ):
                if given:
                    raise wrong_value(name, f"{name} beside a page_table only", "no page_table")
            return
        if table.dtype is not torch.int32 or table.dim() != 2 or table.device != device:
            raise wrong_tensor("page_table", f"torch.int32 [requests, pages] on {device}", table)
        if self.requests is None and table.shape[0] != rows:
            expected = f"torch.int32 [{rows}, pages], a row for each row of scores without requests"
            raise wrong_tensor("page_table", expected, table)
        if table.stride()[1] != 1:
            self.page_table = table.contiguous()


class Outputs(NamedTuple):
    """Where results of a call go, ``[rows, k]`` and contiguous; None: not wanted.

    ``values`` is fp32, the others are int32.
    """

    values: Tensor | None = None
    ids: Tensor | None = None
    slots: Tensor | None = None


def _checked_vector(
    name: str, tensor: Tensor | None, rows: int, device: torch.device
) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.dtype is not torch.int32 or tensor.shape != (rows,) or tensor.device != device:
        raise wrong_tensor(name, f"torch.int32 [{rows}] on {device}", tensor)
    return tensor.contiguous()


def check_indices(scores: Tensor, k: int) -> None:
    """Raise InputError for scores or k that ``topk_indices`` does not serve."""
    check_score_rows(scores)
    check_int("columns of scores", scores.shape[1], 1, MAX_ROW_LENGTH)
    check_int("k", k, 1, MAX_SELECTED)


def indices_cpu(scores: Tensor, k: int, **given: Any) -> Tensor:
    """``topk_indices`` of CPU tensors: the slots, or the ids where no slots are asked for."""
    options = _checked(scores, k, given)
    outputs = _new_outputs(CPU, scores, k, slots=options.maps, ids=not options.maps)
    _compute(scores, k, options, outputs)
    return _wanted(outputs)


def indices_cuda(scores: Tensor, k: int, **given: Any) -> Tensor:
    """``topk_indices`` of CUDA tensors: one launch."""
    options = _checked(scores, k, given)
    kernel = row_kernel(USE, scores.device)
    outputs = _new_outputs(kernel.placement, scores, k, slots=options.maps, ids=not options.maps)
    _launch(kernel, scores, k, options, outputs)
    return _wanted(outputs)


def indices_with_ids_cpu(scores: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor]:
    """``topk_indices.with_ids`` of CPU tensors: ``(slots, ids)``."""
    options = _checked(scores, k, given)
    outputs = _new_outputs(CPU, scores, k, slots=True, ids=True)
    _compute(scores, k, options, outputs)
    return _both(outputs)


def indices_with_ids_cuda(scores: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor]:
    """``topk_indices.with_ids`` of CUDA tensors: one launch."""
    options = _checked(scores, k, given)
    kernel = row_kernel(USE, scores.device)
    outputs = _new_outputs(kernel.placement, scores, k, slots=True, ids=True)
    _launch(kernel, scores, k, options, outputs)
    return _both(outputs)


def indices_out_cpu(scores: Tensor, k: int, **given: Any) -> None:
    """``topk_indices.out`` of CPU tensors."""
    outputs = _callers_outputs(scores, k, given)
    _compute(scores, k, _checked(scores, k, given), outputs)


def indices_out_cuda(scores: Tensor, k: int, **given: Any) -> None:
    """``topk_indices.out`` of CUDA tensors: one launch."""
    outputs = _callers_outputs(scores, k, given)
    options = _checked(scores, k, given)
    _launch(row_kernel(USE, scores.device), scores, k, options, outputs)


def select_cuda(kernel: RowKernel, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk_select`` of CUDA tensors that it serves, by ``kernel``: one launch."""
    values, ids = kernel.placement.outputs(scores.shape[0], k)
    _launch(kernel, scores, k, Options(sorted=True), Outputs(values, ids))
    return values, ids


def _checked(scores: Tensor, k: int, given: dict[str, Any]) -> Options:
    check_indices(scores, k)
    options = Options(**given)
    options.check(scores)
    return options


def _new_outputs(
    placement: Placement, scores: Tensor, k: int, *, slots: bool, ids: bool
) -> Outputs:
    rows = scores.shape[0]
    return Outputs(
        ids=placement.integers(rows, k) if ids else None,
        slots=placement.integers(rows, k) if slots else None,
    )


def _callers_outputs(scores: Tensor, k: int, given: dict[str, Any]) -> Outputs:
    """The caller's own tensors, which are removed from ``given``, after a check."""
    check_indices(scores, k)
    shape = (scores.shape[0], k)
    outputs = Outputs(ids=given.pop("ids_out", None), slots=given.pop("slots_out", None))
    if outputs.ids is None and outputs.slots is None:
        raise wrong_value("ids_out", "ids_out, slots_out or both", "neither of them")
    for name, tensor in (("ids_out", outputs.ids), ("slots_out", outputs.slots)):
        if tensor is not None and (
            tensor.dtype is not torch.int32
            or tensor.shape != shape
            or tensor.device != scores.device
            or not tensor.is_contiguous()
        ):
            expected = f"torch.int32 {list(shape)} on {scores.device}, contiguous"
            raise wrong_tensor(name, expected, tensor)
    return outputs


def _wanted(outputs: Outputs) -> Tensor:
    found = outputs.ids if outputs.slots is None else outputs.slots
    assert found is not None
    return found


def _both(outputs: Outputs) -> tuple[Tensor, Tensor]:
    assert outputs.slots is not None
    assert outputs.ids is not None
    return outputs.slots, outputs.ids


def _compute(scores: Tensor, k: int, options: Options, outputs: Outputs) -> None:
    """The results by ``spec.py``."""
    ids = spec.topk_indices(
        scores,
        k,
        options.row_starts,
        options.row_ends,
        in_rank_order=options.sorted,
        nan_first=options.nan_first,
    )
    if outputs.ids is not None:
        outputs.ids.copy_(ids)
    if outputs.slots is not None:
        outputs.slots.copy_(
            spec.slots(
                ids, options.page_table, options.page_size, options.requests, options.offsets
            )
        )


def _launch(kernel: RowKernel, scores: Tensor, k: int, options: Options, outputs: Outputs) -> None:
    placement = kernel.placement
    if placement.several and placement.elsewhere():
        with placement.current():
            return _launch(kernel, scores, k, options, outputs)
    rows, columns = scores.shape
    if not rows:
        return None
    if scores.stride()[1] != 1:
        scores = scores.contiguous()
    table = options.page_table
    page_rows, page_columns = (0, 0) if table is None else table.shape
    kernel.launcher(scores.element_size(), rows, columns, k).plain(
        placement.stream(),
        scores.data_ptr(),
        _address(options.row_starts),
        _address(options.row_ends),
        _address(table),
        _address(options.requests),
        _address(options.offsets),
        _address(outputs.values),
        _address(outputs.ids),
        _address(outputs.slots),
        rows,
        columns,
        scores.stride()[0],
        k,
        page_rows,
        page_columns,
        0 if table is None else table.stride()[0],
        options.page_size,
        int(options.sorted),
        int(options.nan_first),
    )
    return None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
