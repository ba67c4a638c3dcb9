"""Hidden states whose experts no rounding of logits can change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def clear_rows(weight: Tensor, biases: Sequence[Tensor | None], top_k: int, count: int) -> Tensor:
    """bf16 ``[count, hidden]``, drawn until there are enough: by each of the biases (None: without
    one) the keys of the experts that are chosen are apart, and from the next one, in FP64.
    """
    rows = torch.randn(64 * count, weight.shape[1], device=weight.device).bfloat16()
    scores = nn.functional.softplus(rows.double() @ weight.double().T).sqrt()
    gaps = []
    for bias in biases:
        keys = scores if bias is None else scores + bias
        gaps.append(-keys.topk(top_k + 1).values.diff().amax(1))
    clear = torch.stack(gaps).amin(0) > 1e-4
    return rows[clear][:count]
