"""The oracle: DeepSeek-V4 routing as mathematics, in plain torch.

Every function is a direct transcription of the definition and works on CPU and CUDA tensors.
Kernels are tested against it, and the ops use it for CPU tensors. It favours being obviously right
over being fast, and imports nothing of this package.

Per token, with hidden state ``x`` (bf16, H), gate weight ``W`` (bf16, E x H), selection bias ``b``
(fp32, E), scale ``r`` and ``k`` experts a token::

    logit[e]  = sum_h x[h] W[e, h]                     NaN is stored as 0x7fffffff
    score[e]  = sqrt(softplus(clamp(logit[e])))        NaN logit: 0
    key[e]    = fl32(score[e] + b[e])                  NaN logit or NaN key: -inf; -0: +0
    ids       = the k experts of largest key           equal keys: the lower id first
    weight[j] = (score[ids[j]] / (sum + 1e-20)) * r    sum in rank order

The bias selects and never enters the weights. Results are ``(weights fp32, ids int32)``.

What an engine may pass in beside that, per token:

    image token    selected by another bias
    given ids      those experts in that order instead of the selected ones; one outside [0, E)
                   is no expert: its score is 0
    padding token  k times no expert
    no expert      weight 0; its id is the sentinel
    expert map     physical id = map[id, row modulo count[id]], verbatim; no expert has no entry
"""

from __future__ import annotations

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


def dense_logits64(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """``x @ W.T`` in float64: exact products, one float64 accumulation. ``[N, E]`` float64."""
    return hidden_states.double() @ weight.double().T


def dense_logits(hidden_states: Tensor, weight: Tensor, k_chunk: int | None = None) -> Tensor:
    """The router's logits, ``[N, E]`` fp32.

    With ``k_chunk``, the hidden dimension is cut into chunks of that many elements; each chunk's
    sum is rounded to fp32 and the chunks are added in ascending order, starting from chunk 0's, in
    fp32. That is the order of the dense kernels, except that they also round inside a chunk.
    Without ``k_chunk`` the whole dimension is one chunk.
    """
    hidden_size = hidden_states.shape[-1]
    step = hidden_size if k_chunk is None else k_chunk
    logits = dense_logits64(hidden_states[:, :step], weight[:, :step]).float()
    for start in range(step, hidden_size, step):
        chunk = slice(start, start + step)
        logits = logits + dense_logits64(hidden_states[:, chunk], weight[:, chunk]).float()
    stored_nan = torch.full_like(logits, NAN_LOGIT_BITS, dtype=torch.int32)
    return torch.where(logits.isnan(), stored_nan, logits.view(torch.int32)).view(torch.float32)


def sqrt_softplus64(logits: Tensor) -> Tensor:
    """``sqrt(softplus(z))`` in float64, with softplus(z) = max(z, 0) + log1p(exp(-|z|)).

    A NaN logit gives 0; the others are clamped to the finite fp32 range first.
    """
    z = logits.double().clamp(-LOGIT_MAX, LOGIT_MAX)
    score = torch.sqrt(z.clamp(min=0.0) + torch.log1p(torch.exp(-z.abs())))
    return torch.where(logits.isnan(), torch.zeros_like(score), score)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """The scores in fp32: computed in float64 and rounded once."""
    return sqrt_softplus64(logits).float()


def selection_keys(scores: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """``fl32(score + bias)``: what experts are ranked by. Never NaN, never -0.

    ``logits`` are needed because a NaN logit ranks as -inf whatever its bias is.
    """
    keys = scores + bias
    keys = torch.where(keys == 0, torch.zeros_like(keys), keys)
    return torch.where(logits.isnan() | keys.isnan(), torch.full_like(keys, -torch.inf), keys)


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order: ``(values fp32, ids int32)``.

    Equal scores: the lower id first. NaN ranks as -inf and is returned unchanged; +0 and -0 tie.
    """
    ranks = torch.where(scores.isnan(), torch.full_like(scores, -torch.inf), scores)
    ranks = torch.where(ranks == 0, torch.zeros_like(ranks), ranks)
    order = torch.sort(ranks, dim=-1, descending=True, stable=True).indices[..., :k]
    return scores.gather(-1, order), order.int()


def routing_weights(scores: Tensor, scale: float, renormalize: bool = True) -> Tensor:
    """Weights of the chosen experts from their fp32 scores ``[N, k]`` in rank order.

    Every operation is one fp32 rounding: the sum from left to right, the division, the product.
    """
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
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From fp32 logits ``[N, E]`` to ``(weights [N, k], ids [N, k])``.

    ``image_mask`` and ``padding`` are bool ``[N]``; ``image_bias`` fp32 ``[E]``; ``given_ids``
    integers ``[N, k]``. No expert is ``NO_EXPERT``.
    """
    scores = sqrt_softplus(logits)
    if given_ids is None:
        ids = topk_select(selection_keys(scores, bias, logits), k)[1]
        if image_mask is not None and image_bias is not None:
            of_images = topk_select(selection_keys(scores, image_bias, logits), k)[1]
            ids = torch.where(image_mask.unsqueeze(1), of_images, ids)
    else:
        exists = (given_ids >= 0) & (given_ids < logits.shape[1])
        ids = torch.where(exists, given_ids, torch.full_like(given_ids, NO_EXPERT)).int()
    if padding is not None:
        ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, NO_EXPERT), ids)
    chosen = scores.gather(1, ids.clamp(min=0).long())
    chosen = torch.where(ids >= 0, chosen, torch.zeros_like(chosen))
    return routing_weights(chosen, scale, renormalize), ids


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
    ids: Tensor, rows: Tensor, expert_map: Tensor, replica_counts: Tensor, sentinel: int
) -> Tensor:
    """``expert_map[id, row modulo replica_counts[id]]``, verbatim; the sentinel for ``NO_EXPERT``.

    ``ids`` ``[N, k]``, ``rows`` their numbers in the batch ``[N]``, ``expert_map`` ``[E, R]``,
    ``replica_counts`` ``[E]``. A count outside [1, R] is taken for the nearest in it. An entry of
    the map is returned whatever it is: a negative one means nothing here.
    """
    experts = ids.clamp(min=0).long()
    counts = replica_counts[experts].clamp(1, expert_map.shape[1])
    mapped = expert_map[experts, (rows.unsqueeze(1) % counts).long()]
    return torch.where(ids >= 0, mapped.int(), torch.full_like(ids, sentinel, dtype=torch.int32))


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
) -> tuple[Tensor, Tensor]:
    """From hidden states ``[N, H]`` to ``(weights [N, k], ids [N, k])``."""
    logits = dense_logits(hidden_states, weight, k_chunk)
    return activation_topk(logits, bias, k, scale, renormalize)


def hash_router(
    token_ids: Tensor, table: Tensor, k: int, sentinel: int = -1, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``ids = table[token]``, verbatim, with uniform weights 1/k.

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
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ids = table[token]``, verbatim; weights from the scores of exactly these experts.

    A token outside [0, vocab) gets the sentinel in every id and zero weights, and so does one of
    ``padding`` (bool ``[N]``). An image token (``image_mask``, bool ``[N]``) is not looked up: it
    gets the k experts of largest key, with ``image_bias`` (fp32 ``[E]``) as the bias.
    """
    ids = hash_router(token_ids, table, table.shape[1], sentinel)[1]
    routed = (token_ids >= 0) & (token_ids < table.shape[0])
    if image_mask is not None and image_bias is not None:
        selected = dense_router(hidden_states, weight, image_bias, table.shape[1], scale)[1]
        ids = torch.where(image_mask.unsqueeze(1), selected, ids)
        routed = routed | image_mask
    if padding is not None:
        ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, sentinel), ids)
        routed = routed & ~padding
    routed = routed.unsqueeze(1)
    experts = torch.where(routed, ids, torch.zeros_like(ids))
    scores = sqrt_softplus(gathered_logits64(hidden_states, weight, experts).float())
    weights = routing_weights(scores, scale, renormalize)
    return torch.where(routed, weights, torch.zeros_like(weights)), ids
