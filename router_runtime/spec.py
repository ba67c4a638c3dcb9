"""The oracle: DeepSeek-V4 routing as mathematics, in plain torch.

Every function is a direct transcription of the definition and works on CPU and CUDA tensors.
Kernels are tested against it, and the ops use it for CPU tensors. It favours being obviously right
over being fast, and imports nothing of this package.

Per token, with hidden state ``x`` (bf16, H), gate weight ``W`` (bf16, E x H), selection bias ``b``
(fp32, E), scale ``r`` and ``k`` experts, in numbered steps that everything else refers to:

1. ``logit[e] = sum over h of x[h] W[e, h]``, accumulated in fp32. A NaN is stored as 0x7fffffff.
2. A NaN logit gives score 0 and key -inf. Every other logit becomes ``z[e]``: itself for the gate
   temperature T = 1, else ``fl32(logit[e] * fl32(1 / T))``; clamped to the finite fp32 range.
3. ``score[e] = sqrt(softplus(z[e]))``, with ``softplus(z) = max(z, 0) + log1p(exp(-|z|))``, or
   ``score[e] = sigmoid(z[e]) = 1 / (1 + exp(-z[e]))``: the scoring function of the model.
4. ``key[e] = fl32(score[e] + b[e])``; -0 becomes +0, a NaN becomes -inf. The bias selects and never
   enters a weight.
5. ``ids`` = the k experts of largest key, in descending order; equal keys: the lower id first.
   They are always k distinct ids.
6. ``weight[j] = (score[ids[j]] / (sum + 1e-20)) * r``, where ``sum`` adds the k scores in rank
   order, from left to right. Without renormalization ``weight[j] = score[ids[j]] * r``.
7. A padding token gets k times the sentinel as its id, and zero weights.

The steps after the first round every operation to fp32 once: no contraction, no flushed subnormals.
Results are ``(weights fp32, ids int32)``.

A call may change the steps of some tokens:

- An image token is selected by another bias, in step 4.
- Given ids take the place of steps 4 and 5, in their order, for all tokens or for those that a mask
  marks. An id outside [0, E) is no expert.
- No expert: its score is 0, its weight 0, its id the sentinel.
- An expert map replaces each id at the end: ``physical id = map[id, place modulo count[id]]``,
  taken as it is, where ``place = (start + step * row) modulo 2^32``: the row itself, unless said
  otherwise. No expert is not mapped.
- Shared experts follow the k experts of each token: consecutive ids, all with one given weight. A
  padding token has the sentinel and the weight 0 there too.
- Mode ``hash``: ``ids = table[token]`` with weights 1/k, in place of all steps but the last. Mode
  ``hash_gate``: ``ids = table[token]``, and weights by steps 1 to 3 and 6 at these experts. A token
  outside the vocabulary gets k times no expert.

It may also want to know what was routed:

- The load of each physical id, a number of expert choices: those of padding tokens, and no expert,
  do not count, nor do shared experts.
- The logical ids, with the sentinel for no expert, as they are before the expert map.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: Added to the sum of scores before the division, so that all-zero scores give zero weights.
RENORM_EPSILON = 1e-20
#: The largest finite fp32 number: logits are clamped to [-LOGIT_MAX, LOGIT_MAX].
LOGIT_MAX = torch.finfo(torch.float32).max
#: The bits under which a NaN logit is stored.
NAN_LOGIT_BITS = 0x7FFFFFFF
#: The id of no expert, until ``with_sentinel``.
NO_EXPERT = -1
#: The index, and the slot, in place of those that a short row lacks.
NO_INDEX = -1


def dense_logits64(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Step 1 in float64, ``[N, E]``: exact products, one float64 accumulation."""
    return hidden_states.double() @ weight.double().T


def dense_logits(
    hidden_states: Tensor, weight: Tensor, k_chunk: int | None = None, slices: int = 1
) -> Tensor:
    """The logits of step 1, fp32 ``[N, E]``.

    With ``k_chunk``, the hidden dimension is cut into chunks of that many elements, and the sum of
    each is rounded to fp32. The n chunks are divided into ``slices``: slice i has those from
    i n / slices up to (i + 1) n / slices, both rounded down. The chunks of a slice are added in
    ascending order, in fp32, and then the slices. That is the order of the dense kernels, except
    that they also round inside a chunk. Without ``k_chunk`` the whole dimension is one chunk.
    """
    hidden_size = hidden_states.shape[-1]
    step = hidden_size if k_chunk is None else k_chunk
    sums = [
        dense_logits64(hidden_states[:, start : start + step], weight[:, start : start + step])
        for start in range(0, hidden_size, step)
    ]
    bounds = [number * len(sums) // slices for number in range(slices + 1)]
    parts = [sums[first:end] for first, end in itertools.pairwise(bounds) if first < end]
    logits = _added([_added([chunk.float() for chunk in part]) for part in parts])
    stored_nan = torch.full_like(logits, NAN_LOGIT_BITS, dtype=torch.int32)
    return torch.where(logits.isnan(), stored_nan, logits.view(torch.int32)).view(torch.float32)


def _added(terms: list[Tensor]) -> Tensor:
    """The sum of the terms in their order, starting from the first."""
    return functools.reduce(operator.add, terms)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """The logits of step 2 before they are clamped, in their dtype: fp32, or float64 without the
    rounding of the product. ``temperature`` is rounded to fp32, and so is its inverse.
    """
    if temperature == 1:
        return logits
    inverse = 1 / torch.tensor(temperature, dtype=torch.float32)
    return logits * inverse.to(logits.dtype)


def sqrt_softplus64(logits: Tensor) -> Tensor:
    """``sqrt(softplus(z))`` of steps 2 and 3 in float64, 0 for a NaN."""
    z = logits.double().clamp(-LOGIT_MAX, LOGIT_MAX)
    score = torch.sqrt(z.clamp(min=0.0) + torch.log1p(torch.exp(-z.abs())))
    return torch.where(logits.isnan(), torch.zeros_like(score), score)


def sigmoid64(logits: Tensor) -> Tensor:
    """``sigmoid(z)`` of steps 2 and 3 in float64, 0 for a NaN."""
    z = logits.double()
    small = torch.exp(-z.abs())
    score = torch.where(z >= 0, torch.ones_like(small), small) / (1 + small)
    return torch.where(logits.isnan(), torch.zeros_like(score), score)


#: The scoring functions in float64, by name.
SCORINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sqrtsoftplus": sqrt_softplus64,
    "sigmoid": sigmoid64,
}


def expert_scores(
    logits: Tensor, scoring: str = "sqrtsoftplus", gate_temperature: float = 1.0
) -> Tensor:
    """The scores of steps 2 and 3 of fp32 logits: computed in float64 and rounded to fp32 once."""
    return SCORINGS[scoring](tempered(logits, gate_temperature)).float()


def selection_keys(scores: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """The keys of step 4, ``fl32(score + bias)``: never NaN, never -0.

    ``logits`` are needed because a NaN logit ranks as -inf whatever its bias is.
    """
    keys = scores + bias
    keys = torch.where(keys == 0, torch.zeros_like(keys), keys)
    return torch.where(logits.isnan() | keys.isnan(), torch.full_like(keys, -torch.inf), keys)


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order: ``(values fp32, ids int32)``. Step 5 on keys.

    Equal scores: the lower id first. NaN ranks as -inf and is returned unchanged; +0 and -0 tie.
    """
    ranks = torch.where(scores.isnan(), torch.full_like(scores, -torch.inf), scores)
    ranks = torch.where(ranks == 0, torch.zeros_like(ranks), ranks)
    order = torch.sort(ranks, dim=-1, descending=True, stable=True).indices[..., :k]
    return scores.gather(-1, order), order.int()


def topk_indices(
    scores: Tensor,
    k: int,
    row_starts: Tensor | None = None,
    row_ends: Tensor | None = None,
    *,
    in_rank_order: bool = False,
    nan_first: bool = False,
) -> Tensor:
    """The places of the k largest of each row among its columns from ``row_starts`` up to
    ``row_ends`` (integers ``[N]``): int32 ``[N, k]``, ``NO_INDEX`` behind them where a row has
    fewer than k.

    A place counts from the row's start. Bounds outside of the columns count as the nearest ones.
    Equal scores: the lower place first; +0 and -0 tie; a NaN ranks as -inf, or with ``nan_first``
    above +inf. The places ascend, unless ``in_rank_order``.
    """
    count, columns = scores.shape
    column = torch.arange(columns, device=scores.device)
    ends = torch.full((count,), columns, device=scores.device) if row_ends is None else row_ends
    ends = ends.long().clamp(0, columns).unsqueeze(1)
    starts = torch.zeros_like(ends) if row_starts is None else row_starts.long().unsqueeze(1)
    starts = starts.clamp(min=0)
    # The bits of fp32 as integers that compare like the numbers, with one zero.
    bits = scores.float().view(torch.int32).long()
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    nan_key = 2**32 if nan_first else -0x7F800000
    keys = torch.where(scores.isnan(), torch.full_like(keys, nan_key), keys)
    inside = (column >= starts) & (column < ends)
    keys = torch.where(inside, keys, torch.full_like(keys, -(2**32)))
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :k]
    places = torch.where(inside.gather(1, order), order - starts, torch.full_like(order, columns))
    if not in_rank_order:
        places = places.sort(dim=1).values
    found = torch.full((count, k), NO_INDEX, dtype=torch.int32, device=scores.device)
    taken = torch.where(places < columns, places, torch.full_like(places, NO_INDEX))
    found[:, : order.shape[1]] = taken.int()
    return found


def scores_at(scores: Tensor, ids: Tensor, row_starts: Tensor | None = None) -> Tensor:
    """The scores at the places of ``topk_indices``, fp32 with unchanged bits; -inf for none."""
    columns = ids.long()
    if row_starts is not None:
        columns = columns + row_starts.long().clamp(min=0).unsqueeze(1)
    chosen = torch.where(ids >= 0, columns, torch.zeros_like(columns))
    # As integers: torch may change the bits of a NaN when it gathers or converts bf16.
    if scores.dtype is torch.bfloat16:
        bits = scores.view(torch.int16).gather(1, chosen).int() << 16
    else:
        bits = scores.float().view(torch.int32).gather(1, chosen)
    none = torch.full_like(bits, -0x800000)
    return torch.where(ids >= 0, bits, none).view(torch.float32)


def slots(
    ids: Tensor,
    page_table: Tensor | None = None,
    page_size: int = 1,
    requests: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Where the places ``[N, k]`` of ``topk_indices`` are in a cache of pages: int32 ``[N, k]``,
    ``page_table[request, i // page_size] * page_size + i % page_size + offset`` for place i.

    ``page_table`` ``[R, pages]``, the row's ``requests`` and ``offsets`` ``[N]`` are integers; the
    request of a row is its own number without ``requests``, the slot is ``i + offset`` without a
    table. ``NO_INDEX`` where there is no place, the request is not in [0, R), or the page is not in
    the table. A sum outside of int32 wraps around.
    """
    places = ids.long().clamp(min=0)
    known = ids >= 0
    found = places
    if page_table is not None:
        numbers = torch.arange(ids.shape[0], device=ids.device)
        request = (numbers if requests is None else requests.long()).unsqueeze(1)
        page = places // page_size
        rows, pages = page_table.shape
        known = known & (request >= 0) & (request < rows) & (page < pages)
        if rows and pages:
            chosen = page_table[request.clamp(0, rows - 1), page.clamp(max=pages - 1)].long()
            found = chosen * page_size + places % page_size
    if offsets is not None:
        found = found + offsets.long().unsqueeze(1)
    return torch.where(known, found, torch.full_like(found, NO_INDEX)).to(torch.int32)


def routing_weights(scores: Tensor, scale: float, renormalize: bool = True) -> Tensor:
    """The weights of step 6, from the fp32 scores ``[N, k]`` of the experts in rank order."""
    r = torch.tensor(scale, dtype=torch.float32, device=scores.device)
    if not renormalize:
        return scores * r
    total = scores[:, 0]
    for rank in range(1, scores.shape[1]):
        total = total + scores[:, rank]
    epsilon = torch.tensor(RENORM_EPSILON, dtype=torch.float32, device=scores.device)
    return (scores / (total + epsilon).unsqueeze(1)) * r


def activation_topk(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    renormalize: bool = True,
    *,
    image_mask: Tensor | None = None,
    image_bias: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    padding: Tensor | None = None,
    scoring: str = "sqrtsoftplus",
    gate_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Steps 2 to 7: from fp32 logits ``[N, E]`` to ``(weights [N, k], ids [N, k])``.

    ``image_mask``, ``given_mask`` and ``padding`` are bool ``[N]``; ``image_bias`` fp32 ``[E]``;
    ``given_ids`` integers ``[N, k]``; ``scoring`` is a name of ``SCORINGS``; ``gate_temperature``
    is T. No expert is ``NO_EXPERT``.
    """
    scores = expert_scores(logits, scoring, gate_temperature)
    ids = topk_select(selection_keys(scores, bias, logits), k)[1]
    if image_mask is not None and image_bias is not None:
        of_images = topk_select(selection_keys(scores, image_bias, logits), k)[1]
        ids = torch.where(image_mask.unsqueeze(1), of_images, ids)
    if given_ids is not None:
        ids = with_given(ids, given_ids, given_mask, logits.shape[1])
    if padding is not None:
        ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, NO_EXPERT), ids)
    chosen = scores.gather(1, ids.clamp(min=0).long())
    chosen = torch.where(ids >= 0, chosen, torch.zeros_like(chosen))
    return routing_weights(chosen, scale, renormalize), ids


def with_given(ids: Tensor, given_ids: Tensor, given_mask: Tensor | None, experts: int) -> Tensor:
    """``ids`` ``[N, k]`` in which the rows of ``given_mask``, bool ``[N]``, are those of
    ``given_ids``: all rows without a mask. A given id outside [0, experts) becomes ``NO_EXPERT``.
    """
    exists = (given_ids >= 0) & (given_ids < experts)
    given = torch.where(exists, given_ids, torch.full_like(given_ids, NO_EXPERT)).int()
    return given if given_mask is None else torch.where(given_mask.unsqueeze(1), given, ids)


def padding_rows(
    rows: Tensor, is_padding: Tensor | None = None, num_valid_tokens: Tensor | None = None
) -> Tensor:
    """Which rows are padding, bool ``[N]``: those marked, and those from ``num_valid_tokens``, a
    tensor of one integer, on. ``rows`` are their numbers in the batch.
    """
    padding = torch.zeros_like(rows, dtype=torch.bool)
    if is_padding is not None:
        padding = padding | is_padding
    if num_valid_tokens is not None:
        padding = padding | (rows >= num_valid_tokens)
    return padding


def physical_ids(
    ids: Tensor,
    rows: Tensor,
    expert_map: Tensor,
    replica_counts: Tensor,
    sentinel: int,
    start: int = 0,
    step: int = 1,
) -> Tensor:
    """``expert_map[id, place modulo replica_counts[id]]``, the sentinel for ``NO_EXPERT``; the
    place is ``(start + step * row) modulo 2^32``.

    ``ids`` ``[N, k]``, ``rows`` their numbers in the batch ``[N]``, ``expert_map`` ``[E, R]``,
    ``replica_counts`` ``[E]``. A count outside [1, R] counts as the nearest one in it. An entry of
    the map is returned as it is: a negative one has no meaning here. ``start`` and ``step`` are in
    [0, 2^32), and rows in [0, 2^31).
    """
    experts = ids.clamp(min=0).long()
    counts = replica_counts[experts].clamp(1, expert_map.shape[1])
    places = (start + step * rows.long()) % 2**32
    mapped = expert_map[experts, (places.unsqueeze(1) % counts).long()]
    return torch.where(ids >= 0, mapped.int(), torch.full_like(ids, sentinel, dtype=torch.int32))


def expert_load(physical: Tensor, ids: Tensor, experts: int) -> Tensor:
    """How often each physical id was chosen, int32 ``[experts]``.

    ``physical`` ``[N, k]`` are the physical ids, ``ids`` ``[N, k]`` those before the map, of which
    ``NO_EXPERT`` does not count. Nor does a physical id outside [0, experts).
    """
    counted = (ids >= 0) & (physical >= 0) & (physical < experts)
    return torch.bincount(physical[counted].long(), minlength=experts).int()


def with_shared_experts(
    weights: Tensor,
    ids: Tensor,
    padding: Tensor,
    first: int,
    weight: float,
    count: int,
    sentinel: int,
) -> tuple[Tensor, Tensor]:
    """``(weights [N, k + count], ids [N, k + count])``: the ``count`` shared experts from the id
    ``first`` on follow in each row, each with ``weight``; the sentinel with 0 where ``padding``,
    bool ``[N]``.
    """
    shared = torch.arange(first, first + count, device=ids.device).to(ids.dtype)
    rows = padding.unsqueeze(1)
    shared_ids = torch.where(rows, torch.full_like(shared, sentinel), shared)
    shared_weights = torch.where(rows, 0.0, torch.full_like(weights[:, :1], weight))
    return torch.cat((weights, shared_weights.expand(-1, count)), 1), torch.cat(
        (ids, shared_ids), 1
    )


def packed(weights: Tensor, ids: Tensor) -> Tensor:
    """``(id << 16) | bits of bf16(weight)`` in 32 bits: int32 of the shape of ``ids``. Of an id
    there are the lower 16 bits; a weight is rounded to the nearest, ties to even.
    """
    halves = weights.bfloat16().view(torch.int16).int() & 0xFFFF
    return (ids.int() << 16) | halves


def with_sentinel(ids: Tensor, sentinel: int) -> Tensor:
    """Ids in which ``NO_EXPERT`` has become the sentinel."""
    return torch.where(ids >= 0, ids, torch.full_like(ids, sentinel))


def dense_router(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    renormalize: bool = True,
    k_chunk: int | None = None,
    slices: int = 1,
    scoring: str = "sqrtsoftplus",
    gate_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Steps 1 to 6: from hidden states ``[N, H]`` to ``(weights [N, k], ids [N, k])``."""
    logits = dense_logits(hidden_states, weight, k_chunk, slices)
    return activation_topk(
        logits,
        bias,
        k,
        scale,
        renormalize,
        scoring=scoring,
        gate_temperature=gate_temperature,
    )


def hash_router(
    token_ids: Tensor, table: Tensor, k: int, sentinel: int = -1, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``ids = table[token]``, as they are there, with equal weights 1/k.

    A token outside [0, vocab) and a padding token get the sentinel in every id and zero weights;
    the table is not read for them.
    """
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    if padding is not None:
        known = known & ~padding
    rows = table[torch.where(known, token_ids, torch.zeros_like(token_ids)).long()]
    ids = torch.where(known.unsqueeze(1), rows.int(), torch.full_like(rows, sentinel).int())
    share = torch.full(ids.shape, 1.0 / k, dtype=torch.float32, device=ids.device)
    return torch.where(known.unsqueeze(1), share, torch.zeros_like(share)), ids


def gathered_logits64(hidden_states: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The logits of each token's own experts, ``ids`` ``[N, k]``: float64 ``[N, k]``. Products are
    exact, one float64 accumulation each.
    """
    x = hidden_states.double()
    logits = [(x * weight[chosen.long()].double()).sum(dim=1) for chosen in ids.unbind(1)]
    return torch.stack(logits, dim=1)


def hash_gate(
    hidden_states: Tensor,
    token_ids: Tensor,
    weight: Tensor,
    table: Tensor,
    scale: float,
    renormalize: bool = True,
    sentinel: int = -1,
    *,
    image_mask: Tensor | None = None,
    image_bias: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    padding: Tensor | None = None,
    scoring: str = "sqrtsoftplus",
    gate_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``ids = table[token]``, as they are there; weights by steps 1 to 3 and 6 at these experts.

    A token outside [0, vocab) gets the sentinel in every id and zero weights, and so does one of
    ``padding`` (bool ``[N]``). An image token (``image_mask``, bool ``[N]``) is not looked up: it
    gets the k experts of largest key, with ``image_bias`` (fp32 ``[E]``) as the bias. Nor is a
    token whose experts are given: ``given_ids``, integers ``[N, k]``, of all tokens or of those in
    ``given_mask``, bool ``[N]``.
    """
    ids = hash_router(token_ids, table, table.shape[1], sentinel)[1]
    routed = (token_ids >= 0) & (token_ids < table.shape[0])
    if image_mask is not None and image_bias is not None:
        selected = dense_router(
            hidden_states,
            weight,
            image_bias,
            table.shape[1],
            scale,
            scoring=scoring,
            gate_temperature=gate_temperature,
        )[1]
        ids = torch.where(image_mask.unsqueeze(1), selected, ids)
        routed = routed | image_mask
    exists = routed.unsqueeze(1).expand_as(ids)
    if given_ids is not None:
        given = with_given(torch.where(exists, ids, NO_EXPERT), given_ids, given_mask, len(weight))
        exists = given >= 0
        ids = torch.where(exists, given, torch.full_like(given, sentinel))
    if padding is not None:
        ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, sentinel), ids)
        exists = exists & ~padding.unsqueeze(1)
    experts = torch.where(exists, ids, torch.zeros_like(ids))
    logits = gathered_logits64(hidden_states, weight, experts).float()
    scores = expert_scores(logits, scoring, gate_temperature)
    scores = torch.where(exists, scores, torch.zeros_like(scores))
    return routing_weights(scores, scale, renormalize), ids
