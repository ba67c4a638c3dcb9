"""Dense gates on a GPU: which kernel serves a batch, and its launch."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from router_runtime.device.kernels import Kernels
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.packing import selector
from router_runtime.device.tensor_map import Matrix
from router_runtime.evidence.choice import DENSE, TokenRange
from router_runtime.routing.call import LOOKUP, Call, Results
from router_runtime.routing.checks import check_activations, readable_rows
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.launches import Served, ServingLaunch, narrow_ids, served
from router_runtime.routing.options import Sizes
from router_runtime.routing.placement import Placement
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights
from router_runtime.routing.workspace import workspaces_of

#: What a launch of a dense kernel may be given. A contract takes those that it names.
_VARYING = (
    *("hidden_states", "weights_out", "ids_out", "logits_out", "tokens", "row_stride"),
    *("workspace", "token_ids_i32", "token_ids_i64"),
)


class Launcher(Protocol):
    """One kernel, bound to the weights of one router. ``DenseLauncher`` says what is what."""

    mapped: bool
    selects_images: bool

    def __call__(
        self,
        stream: int,
        address: int,
        row_stride: int,
        tokens: int,
        weights: int,
        ids: int,
        logits: int,
        served: Served | None = None,
        token_ids: tuple[int, int] = (0, 0),
    ) -> None:
        """Launch on ``stream``."""


class DenseLauncher:
    """One dense kernel, bound to the weights of one router. It selects experts by their scores and
    the bias; for a router with a table and no bias it looks them up there, as hash_gate does.

    Attributes:
        mapped: whether the kernel reads the hidden states through a tensor map, which takes no rows
            that overlap.
        selects_images: whether a kernel that looks experts up selects those of image tokens.

    """

    selects_images = True

    def __init__(
        self, kernel: LoadedKernel, config: RouterConfig, weights: Weights, placement: Placement
    ) -> None:
        contract = kernel.entry.contract
        self.mapped = any(recipe.argument == "hidden_states" for recipe in contract.tensor_maps)
        self._hidden_size = config.hidden_size
        self._workspaces = workspaces_of(kernel, placement.device)
        self._workspaces.address(placement.stream())  # made now, and not by the first call
        looks_up = "table" in weights.tensors
        fixed: dict[str, Any] = {"scale": config.routed_scaling_factor}
        if looks_up:
            # No look-up reads the bias, but the kernel loads it.
            fixed["bias"] = weights.weight.new_zeros(config.num_experts, dtype=torch.float32)
            fixed |= {"table": weights.table, "vocab": weights.table.shape[0]}
        else:
            fixed |= {"bias": weights.bias, **dict.fromkeys(LOOKUP, 0)}
        fixed |= {"renormalize": int(config.renormalize), "sentinel": config.sentinel}
        fixed["image_bias"] = weights.image_bias
        fixed |= {recipe.parameter: weights.packed(recipe) for recipe in contract.repacks}
        given = [
            index
            for index, name in enumerate(_VARYING)
            if name in kernel.arguments and name not in fixed
        ]
        self._select = selector(given)
        varying = tuple(_VARYING[index] for index in given)
        self._launch = ServingLaunch(kernel, varying, looks_up=looks_up, **fixed)

    def __call__(
        self,
        stream: int,
        address: int,
        row_stride: int,
        tokens: int,
        weights: int,
        ids: int,
        logits: int,
        served: Served | None = None,
        token_ids: tuple[int, int] = (0, 0),
    ) -> None:
        """Launch on ``stream``.

        Args:
            stream: the raw handle of the current stream.
            address: where the hidden states start, a multiple of 16.
            row_stride: from a row of them to the next, in elements.
            tokens: the number of rows, in the range of the kernel.
            weights: where the weights go, fp32 ``[tokens, top_k]``.
            ids: where int32 ids go; 0 if they are int64, which ``served`` has the address of.
            logits: where the logits go, fp32 ``[tokens, num_experts]``; 0 for none.
            served: what the call has beside, if it is no plain one.
            token_ids: where int32 and where int64 token ids are, for a router with a table; one of
                the two is 0.

        """
        rows: int | Matrix = address
        if self.mapped:
            rows = Matrix(address, tokens, self._hidden_size, row_stride)
        workspace = self._workspaces.address(stream)
        given = self._select(
            (rows, weights, ids, logits, tokens, row_stride, workspace, *token_ids)
        )
        if served is None:
            self._launch.plain(stream, *given)
        else:
            self._launch.serve(stream, given, served)


def rows_for(launcher: Launcher, tensor: Tensor) -> tuple[Tensor, int, int]:
    """``readable_rows`` that a kernel can read: through a tensor map, rows do not overlap."""
    tensor, address, row_stride = readable_rows(tensor)
    columns = tensor.shape[1]
    if row_stride < columns and launcher.mapped:
        # The rows overlap, or there is one row, whose stride may be anything.
        tensor = tensor.contiguous()
        address, row_stride = tensor.data_ptr(), columns
    return tensor, address, row_stride


class Plan:
    """Launchers by the most tokens that each serves, in ascending order."""

    def __init__(
        self, token_ranges: Sequence[TokenRange], launchers: Mapping[str, Launcher]
    ) -> None:
        self.highs = [each.high for each in token_ranges]
        self.launchers = [launchers[each.entry.key] for each in token_ranges]

    def parts(self, tokens: int) -> Iterator[slice]:
        """The rows of each launch of a batch. No bit of a result depends on where it is cut."""
        most = self.highs[-1]
        for start in range(0, tokens, most):
            yield slice(start, min(start + most, tokens))


class CudaDense:
    """A dense gate on a GPU. All batch sizes are divided among the kernels when it is built.

    Not every kernel can store logits, so calls that want them have a division of their own, which
    may be empty: such a call then raises ResolutionError. A kernel of both is loaded once.

    Attributes:
        token_ranges: which kernel serves how many tokens.
        evidence: key of each entry that serves -> its evidence status.
        logits_token_ranges: the same for calls that also want logits.
        plan: the launchers of ``token_ranges``.
        logits_plan: the launchers of ``logits_token_ranges``.

    """

    def __init__(
        self,
        config: RouterConfig,
        weights: Weights,
        kernels: Kernels,
        selection: Selection,
    ) -> None:
        self._hidden_size, self._experts = config.hidden_size, config.num_experts
        self._top_k = config.top_k
        self._sizes = Sizes.of(config, weights)
        self._weights = weights
        self.placement = Placement(weights.weight.device)
        requests = [selection.request(kernel, config.constants()) for kernel in DENSE]
        self.token_ranges = kernels.dispatch(requests).require()
        self._logits_dispatch = kernels.dispatch(
            [dataclasses.replace(request, parameters=("logits_out",)) for request in requests]
        )
        self.logits_token_ranges = self._logits_dispatch.token_ranges
        entries = {
            each.entry.key: each.entry for each in (*self.token_ranges, *self.logits_token_ranges)
        }
        self.evidence: Mapping[str, str] = {
            key: kernels.status(entry) for key, entry in entries.items()
        }
        launchers = {
            key: DenseLauncher(kernels.load_entry(entry), config, weights, self.placement)
            for key, entry in entries.items()
        }
        self.plan = Plan(self.token_ranges, launchers)
        self.logits_plan = Plan(self.logits_token_ranges, launchers)

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Have ``captured`` called, once: by the next launch that a CUDA graph captures."""
        self.placement.captured = captured

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the ids for bf16 hidden states ``[tokens, hidden_size]``."""
        placement = self.placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.route(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens:
            self._launch(self.plan, tensor, tokens, weights, ids, None)
        return weights, ids

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        placement = self.placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.serve(tensor, call, expert_map)
        results = call.prepare(placement, tokens, self._sizes)
        plan = self.plan
        if results.logits is not None:
            self._logits_dispatch.require()
            plan = self.logits_plan
        for rows in plan.parts(tokens):
            part = results.part(rows)
            given = served(call, rows, part, expert_map)
            self._launch(plan, tensor[rows], rows.stop - rows.start, *part[:3], given)
        return results

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``route``, and the logits, fp32 ``[tokens, num_experts]``."""
        self._logits_dispatch.require()
        placement = self.placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.route_with_logits(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        logits = placement.floats(tokens, self._experts)
        if tokens:
            self._launch(self.logits_plan, tensor, tokens, weights, ids, logits)
        return weights, ids, logits

    def _launch(
        self,
        plan: Plan,
        tensor: Tensor,
        tokens: int,
        weights: Tensor,
        ids: Tensor,
        logits: Tensor | None,
        served: Served | None = None,
    ) -> None:
        own = self._weights
        if own.keys[0]._version != own.version:
            own.follow()
        place = bisect.bisect_left(plan.highs, tokens)
        if place == len(plan.highs):
            for rows in plan.parts(tokens):
                part = Results(weights, ids, logits).part(rows)
                self._launch(plan, tensor[rows], rows.stop - rows.start, *part[:3])
            return
        launcher = plan.launchers[place]
        # ``tensor`` becomes the copy, if there is one: it must stay alive until the launch.
        tensor, address, row_stride = rows_for(launcher, tensor)
        launcher(
            self.placement.stream(),
            address,
            row_stride,
            tokens,
            weights.data_ptr(),
            ids.data_ptr() if served is None else narrow_ids(ids),
            0 if logits is None else logits.data_ptr(),
            served,
        )
