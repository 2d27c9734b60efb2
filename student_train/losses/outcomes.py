"""What a student says of a teacher's outcomes: the kept ids, and everything else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from student_train.objective import Objective

_CHUNK_BYTES = 96 * 2**20


@torch.no_grad()
def outcome_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_NK: Tensor,
    is_kept_NK: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Logprobs of each row's kept ids and of its tail.

    Args:
        hidden_ND: [N, D] outputs of the body at the positions that predict the tokens.
        weight_VD: [V, D] weight of the head.
        ids_NK: [N, K] int64 ids in [0, V), distinct within a row where they are kept.
        is_kept_NK: [N, K] bool; the other columns are padding.
        objective: Gives the logits' scale and softcap.
        bias: [V] or None.

    Returns:
        [N, K + 1] float32 nats, the tail last; -inf for padding.
    """
    num_rows = max(1, _CHUNK_BYTES // (4 * len(weight_VD)))
    chunks = []
    for first in range(0, len(hidden_ND), num_rows):
        rows = slice(first, first + num_rows)
        logits_CV = linear(hidden_ND[rows], weight_VD, bias).float() * objective.logit_scale
        if objective.softcap is not None:
            logits_CV = objective.softcap * torch.tanh(logits_CV / objective.softcap)
        logprobs_CV = logits_CV.log_softmax(dim=-1)
        ids_CK, is_kept_CK = ids_NK[rows], is_kept_NK[rows]
        kept_CK = logprobs_CV.gather(1, ids_CK).masked_fill(~is_kept_CK, -torch.inf)
        # Padding repeats an id that may not be kept: only what is kept leaves the tail.
        is_left_CV = torch.zeros_like(logprobs_CV, dtype=torch.bool)
        row_CK = torch.arange(len(ids_CK), device=ids_CK.device)[:, None].expand_as(ids_CK)
        is_left_CV[row_CK[is_kept_CK], ids_CK[is_kept_CK]] = True
        tail_C = logprobs_CV.masked_fill(is_left_CV, -torch.inf).logsumexp(dim=-1)
        chunks.append(torch.cat([kept_CK, tail_C[:, None]], dim=1))
    return torch.cat(chunks)
