"""Gates that look experts up by token id, on a GPU: modes ``hash`` and ``hash_gate``."""

from __future__ import annotations

import bisect
import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from router_runtime.device.dispatch import gate_requests
from router_runtime.device.kernels import Kernels
from router_runtime.device.launch import LoadedKernel
from router_runtime.evidence.choice import TokenRange
from router_runtime.format.manifest import Entry
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import (
    NoMemory,
    check_activations,
    check_token_ids,
    wrong_token_ids,
)
from router_runtime.routing.config import HASH_GATE, HASH_ROUTER, RouterConfig
from router_runtime.routing.cuda_dense import DenseLauncher, Launcher, Plan, rows_for
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.launches import Served, ServingLaunch, narrow_ids, served
from router_runtime.routing.options import Sizes
from router_runtime.routing.placement import Placement
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights


class CudaHash:
    """A table of experts by token id, on a GPU."""

    token_ranges: tuple[TokenRange, ...] = ()

    def __init__(
        self,
        config: RouterConfig,
        weights: Weights,
        kernels: Kernels,
        selection: Selection,
    ) -> None:
        self._top_k, self._sizes = config.top_k, Sizes.of(config, weights)
        self._weights, table = weights, weights.table
        self.placement = Placement(table.device)
        kernel = kernels.load(selection.request(HASH_ROUTER, {}, {"top_k": config.top_k}))
        self.evidence: Mapping[str, str] = {kernel.entry.key: kernels.status(kernel.entry)}
        self._launch = ServingLaunch(
            kernel,
            ("token_ids_i32", "token_ids_i64", "weights_out", "ids_out", "tokens"),
            table=table,
            vocab=table.shape[0],
            top_k=config.top_k,
            sentinel=config.sentinel,
        )

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Have ``captured`` called, once: by the next launch that a CUDA graph captures."""
        self.placement.captured = captured

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the ids for token ids ``[tokens]``."""
        placement = self.placement
        tokens = check_token_ids(tensor, placement.device)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.route(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens == 0:
            return weights, ids
        own = self._weights
        if own.keys[0]._version != own.version:
            own.follow()
        words = tensor.contiguous()
        narrow, wide = _both_widths(words)
        launch = self._launch.plain
        launch(placement.stream(), narrow, wide, weights.data_ptr(), ids.data_ptr(), tokens)
        return weights, ids

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        placement = self.placement
        tokens = check_token_ids(tensor, placement.device)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.serve(tensor, call, expert_map)
        results = call.prepare(placement, tokens, self._sizes)
        if tokens:
            self._weights.current()
            words = tensor.contiguous()
            narrow, wide = _both_widths(words)
            given = narrow, wide, results.weights.data_ptr(), narrow_ids(results.ids), tokens
            beside = served(call, slice(0, tokens), results, expert_map)
            self._launch.serve(placement.stream(), given, beside)
        return results


class GateLauncher:
    """The kernel hash_gate, bound to the weights of one router."""

    mapped = False

    def __init__(self, kernel: LoadedKernel, config: RouterConfig, weights: Weights) -> None:
        #: A variant without image tokens would look their experts up.
        self.selects_images = bool(kernel.entry.constants["IMAGES"])
        recipes = kernel.entry.contract.repacks
        packed: dict[str, Any] = {each.parameter: weights.packed(each) for each in recipes}
        self._launch = ServingLaunch(
            kernel,
            (
                *("hidden_states", "row_stride", "token_ids_i32", "token_ids_i64"),
                *("weights_out", "ids_out", "tokens"),
            ),
            table=weights.table,
            vocab=weights.table.shape[0],
            scale=config.routed_scaling_factor,
            renormalize=int(config.renormalize),
            sentinel=config.sentinel,
            image_bias=weights.image_bias,
            **packed,
        )

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
        """As ``DenseLauncher`` does it, without logits."""
        given = address, row_stride, *token_ids, weights, ids, tokens
        if served is None:
            self._launch.plain(stream, *given)
        else:
            self._launch.serve(stream, given, served)


class CudaHashGate:
    """A table of experts by token id, weighed by the gate's scores, on a GPU.

    The resolver has divided the batches among the variants of the kernel hash_gate, which computes
    the logits of a token's experts alone, and of the dense kernel for many tokens, which computes
    all of them, from one read of the weight for many tokens. Both add a logit in the same order.
    Batches with image tokens, if the gate has a bias for them, have a variant of their own where
    hash_gate serves.
    """

    def __init__(
        self,
        config: RouterConfig,
        weights: Weights,
        kernels: Kernels,
        selection: Selection,
    ) -> None:
        self._hidden_size, self._top_k = config.hidden_size, config.top_k
        self._weights, self._sizes = weights, Sizes.of(config, weights)
        self.placement = Placement(weights.table.device)
        self.token_ranges = _divide(config, kernels, selection)
        entries = {each.entry.key: each.entry for each in self.token_ranges}
        images: Entry | None = None
        if weights.image_bias is not None:
            # A named variant is that of text tokens; images have variants of their own.
            with_images = selection.request(HASH_GATE, config.constants() | {"IMAGES": 1})
            images = kernels.resolve(dataclasses.replace(with_images, variant=None)).require()
            entries[images.key] = images

        def launcher(entry: Entry) -> Launcher:
            kernel = kernels.load_entry(entry)
            if entry.kernel == HASH_GATE:
                return GateLauncher(kernel, config, weights)
            return DenseLauncher(kernel, config, weights, self.placement)

        launchers = {key: launcher(entry) for key, entry in entries.items()}
        self._plan = Plan(self.token_ranges, launchers)
        self._images = None if images is None else launchers[images.key]
        self.evidence: Mapping[str, str] = {
            key: kernels.status(entry) for key, entry in entries.items()
        }

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Have ``captured`` called, once: by the next launch that a CUDA graph captures."""
        self.placement.captured = captured

    def route(
        self, hidden_states: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights and the ids for hidden states and their token ids."""
        if token_ids is None:
            raise wrong_token_ids("hash_gate", given=False)
        placement = self.placement
        tokens = check_activations(hidden_states, self._hidden_size, placement.device)
        check_token_ids(token_ids, placement.device, tokens)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.route(hidden_states, token_ids)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens == 0:
            return weights, ids
        own = self._weights
        weight, table = own.keys
        if weight._version + table._version != own.version:
            own.follow()
        if tokens <= self._plan.highs[-1]:
            self._launch(hidden_states, token_ids, weights, ids)
            return weights, ids
        for rows in self._plan.parts(tokens):
            self._launch(hidden_states[rows], token_ids[rows], weights[rows], ids[rows])
        return weights, ids

    def serve(self, hidden_states: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        placement = self.placement
        tokens = check_activations(hidden_states, self._hidden_size, placement.device)
        token_ids = typing.cast(Tensor, call.token_ids)
        check_token_ids(token_ids, placement.device, tokens)
        if placement.several and placement.elsewhere():
            with placement.current():
                return self.serve(hidden_states, call, expert_map)
        results = call.prepare(placement, tokens, self._sizes)
        if tokens == 0:
            return results
        self._weights.current()
        images = call.image_mask is not None
        for rows in self._plan.parts(tokens):
            x, words, part = hidden_states, token_ids, results
            if tokens > self._plan.highs[-1]:  # slices take time
                x, words, part = x[rows], words[rows], part.part(rows)
            given = served(call, rows, part, expert_map)
            self._launch(x, words, *part[:2], given, images)
        return results

    def _launch(
        self,
        hidden_states: Tensor,
        token_ids: Tensor,
        weights: Tensor,
        ids: Tensor,
        served: Served | None = None,
        images: bool = False,
    ) -> None:
        """Launch for one part of a batch, which may have image tokens with ``images``."""
        tokens, plan = len(hidden_states), self._plan
        launcher = plan.launchers[bisect.bisect_left(plan.highs, tokens)]
        if images and self._images is not None and not launcher.selects_images:
            launcher = self._images
        # Both names keep a copy alive until the launch, if there is one.
        hidden_states, address, row_stride = rows_for(launcher, hidden_states)
        words = token_ids.contiguous()
        launcher(
            self.placement.stream(),
            address,
            row_stride,
            tokens,
            weights.data_ptr(),
            ids.data_ptr() if served is None else narrow_ids(ids),
            0,
            served,
            _both_widths(words),
        )


def _divide(config: RouterConfig, kernels: Kernels, selection: Selection) -> tuple[TokenRange, ...]:
    """Which kernel serves how many tokens. If the caller names variants, their kernels alone do."""
    requests = gate_requests(selection.request(HASH_GATE, config.constants() | {"IMAGES": 0}))
    variants = selection.variants
    if variants:
        requests = tuple(
            dataclasses.replace(each, variant=variants[each.kernel], leads=True)
            for each in requests
            if each.kernel in variants
        )
    return kernels.dispatch(requests).require()


def _both_widths(words: Tensor) -> tuple[int, int]:
    """The address of int32 or int64 token ids as (of int32, of int64): the other one is null."""
    address = words.data_ptr()
    if not address:
        raise NoMemory("token_ids")
    return (0, address) if words.dtype is torch.int64 else (address, 0)
