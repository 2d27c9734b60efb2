"""Rank of the target token among all ids under a linear head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

_CHUNK_BYTES = 96 * 2**20


@torch.no_grad()
def target_ranks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    *,
    bias: Tensor | None = None,
    largest: int,
) -> Tensor:
    """Rank of each token among all ids by the head's logits, from 1 for the likeliest.

    A scale or softcap of the logits does not change a rank, so neither is an argument.

    Args:
        hidden_ND: [N, D] outputs of the body at the positions that predict the tokens.
        weight_VD: [V, D] weight of the head.
        target_ids_N: [N] tokens that the trace holds.
        bias: [V] or None.
        largest: Largest rank; higher ones count as this one.

    Returns:
        [N] int64; ids with equal logits all get the best of their ranks.
    """
    num_rows = max(1, _CHUNK_BYTES // (4 * len(weight_VD)))
    ranks = []
    for first in range(0, len(hidden_ND), num_rows):
        rows = slice(first, first + num_rows)
        logits_CV = linear(hidden_ND[rows], weight_VD, bias)
        of_target_C1 = logits_CV.gather(1, target_ids_N[rows].long()[:, None])
        ranks.append((logits_CV > of_target_C1).sum(dim=1) + 1)
    return torch.cat(ranks).clamp(max=largest)
