"""Gates that look experts up by token id, on a GPU: modes ``hash`` and ``hash_gate``."""

from __future__ import annotations

import bisect
import dataclasses
import typing
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from router_runtime.device.kernels import Kernels
from router_runtime.device.launch import LoadedKernel
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import (
    NoMemory,
    check_activations,
    check_token_ids,
    readable_rows,
    wrong_token_ids,
)
from router_runtime.routing.config import HASH_GATE, HASH_ROUTER, RouterConfig
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.launches import ServingLaunch, narrow_ids, served
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
        if own.key._version != own.version:
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


class CudaHashGate:
    """A table of experts by token id, weighed by the gate's scores, on a GPU.

    The resolver has divided the batches among the kernel's variants. Batches with image tokens, if
    the gate has a bias for them, have a variant of their own.
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
        shape = config.constants()
        constants = shape | {"IMAGES": 0}
        request = selection.request(HASH_GATE, constants)
        self.token_ranges = kernels.dispatch([request]).require()

        def launch(kernel: LoadedKernel) -> ServingLaunch:
            return ServingLaunch(
                kernel,
                (
                    *("hidden_states", "row_stride", "token_ids_i32", "token_ids_i64"),
                    *("weights_out", "ids_out", "tokens"),
                ),
                weight=weights.weight,
                table=weights.table,
                vocab=weights.table.shape[0],
                scale=config.routed_scaling_factor,
                renormalize=int(config.renormalize),
                sentinel=config.sentinel,
                image_bias=weights.image_bias,
            )

        self._highs = [each.high for each in self.token_ranges]
        self._launches = [launch(kernels.load_entry(each.entry)) for each in self.token_ranges]
        entries = [each.entry for each in self.token_ranges]
        self._images: ServingLaunch | None = None
        if weights.image_bias is not None:
            # A named variant is that of text tokens; images have variants of their own.
            with_images = dataclasses.replace(
                request, constants=shape | {"IMAGES": 1}, variant=None
            )
            images = kernels.load(with_images)
            self._images = launch(images)
            entries.append(images.entry)
        self.evidence: Mapping[str, str] = {entry.key: kernels.status(entry) for entry in entries}

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
        if own.key._version != own.version:
            own.follow()
        # Both names keep a copy alive until the launch, if there is one.
        hidden_states, address, row_stride = readable_rows(hidden_states)
        words = token_ids.contiguous()
        self._launches[bisect.bisect_left(self._highs, tokens)].plain(
            placement.stream(),
            address,
            row_stride,
            *_both_widths(words),
            weights.data_ptr(),
            ids.data_ptr(),
            tokens,
        )
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
        launch = self._launches[bisect.bisect_left(self._highs, tokens)]
        if call.image_mask is not None and self._images is not None:
            launch = self._images
        hidden_states, address, row_stride = readable_rows(hidden_states)
        words = token_ids.contiguous()
        addresses = results.weights.data_ptr(), narrow_ids(results.ids)
        launch.serve(
            placement.stream(),
            (address, row_stride, *_both_widths(words), *addresses, tokens),
            served(call, slice(0, tokens), results, expert_map),
        )
        return results


def _both_widths(words: Tensor) -> tuple[int, int]:
    """The address of int32 or int64 token ids as (of int32, of int64): the other one is null."""
    address = words.data_ptr()
    if not address:
        raise NoMemory("token_ids")
    return (0, address) if words.dtype is torch.int64 else (address, 0)
