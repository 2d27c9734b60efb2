"""Auxiliary loss of the routers of a mixture of experts: small where all experts are used alike.

Letters: L layers with experts, R positions, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def router_balance_loss(
    router_logits: Sequence[Tensor], is_real_R: Tensor, *, num_chosen: int
) -> Tensor:
    """Balance of experts over all layers, as in the Switch Transformer (arXiv 2101.03961, eq. 4-6).

        loss = E sum_e f_e P_e

    f_e is the number of times that expert e is chosen per position, P_e its mean probability. Equal
    use gives `num_chosen`. It is what models of `transformers` add to their own loss.

    Args:
        router_logits: L times [R, E], with their gradients.
        is_real_R: [R] bool, False for padding, which counts nowhere.
        num_chosen: Experts that work on each position.

    Returns:
        [] float32; 0 where there is no position.
    """
    num_experts = router_logits[0].shape[-1]
    is_real = is_real_R.float()
    num_rows = (len(router_logits) * is_real.sum()).clamp(min=1.0)
    chosen_E = is_real.new_zeros(num_experts)
    probability_E = is_real.new_zeros(num_experts)
    for logits_RE in router_logits:
        probs_RE = torch.softmax(logits_RE.float(), dim=-1)
        ids_RC = probs_RE.topk(num_chosen, dim=-1).indices
        weight_RC = is_real[:, None].expand_as(ids_RC)
        chosen_E = chosen_E.scatter_add(0, ids_RC.flatten(), weight_RC.flatten())
        probability_E = probability_E + (probs_RE * is_real[:, None]).sum(dim=0)
    return num_experts * (chosen_E / num_rows * (probability_E / num_rows)).sum()
