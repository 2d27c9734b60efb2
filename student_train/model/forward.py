"""What a device computes of a micro-batch: body and loss in one forward.

Letters: B rows, T positions, N valid tokens, D hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.batch.micro_batch import MicroBatch
from student_train.losses import (
    DEFAULT_OBJECTIVE,
    Objective,
    SparseKLOutput,
    sparse_kl,
    sparse_kl_per_token,
    target_ranks,
)
from student_train.model.load import HeadScaling, output_layer

# What StudentWithLoss sums over valid tokens, beside the loss.
SUMS = ("kl", "ce", "student_mass", "teacher_mass", "top1_agreement")


class StudentWithLoss(nn.Module):
    """Body and loss in one forward, so that a sharded head is whole where the loss uses it."""

    def __init__(
        self, model: PreTrainedModel, head: HeadScaling, objective: Objective = DEFAULT_OBJECTIVE
    ) -> None:
        """Take an objective apart from its softcap and logit_scale, which are the head's."""
        super().__init__()
        self.model = model
        self._objective = replace(objective, softcap=head.softcap, logit_scale=head.logit_scale)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Returns:
            The loss [], weighted and summed over valid tokens, and the detached sums over valid
            tokens [5] float64 of `SUMS`.
        """
        output = output_layer(self.model)
        result = sparse_kl(
            self._hidden(batch),
            output.weight,
            batch.targets,
            batch.token_weight,
            self._objective,
            bias=output.bias,
        )
        parts = (result.kl, result.ce, result.student_mass, result.teacher_mass, result.top1)
        return result.loss, torch.stack([part.double().sum() for part in parts])

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> SparseKLOutput:
        """What `forward` sums, token by token [N]; for measuring, not for training."""
        return self._loss_per_token(self._hidden(batch), batch)

    def _loss_per_token(self, hidden_ND: Tensor, batch: MicroBatch) -> SparseKLOutput:
        output = output_layer(self.model)
        return sparse_kl_per_token(
            hidden_ND,
            output.weight,
            batch.targets,
            self._objective,
            bias=output.bias,
        )

    @torch.no_grad()
    def per_token_and_rank(
        self, batch: MicroBatch, *, largest_rank: int
    ) -> tuple[SparseKLOutput, Tensor]:
        """`per_token`, and the rank of each realised token [N]; see `target_ranks`."""
        output, hidden_ND = output_layer(self.model), self._hidden(batch)
        rank_N = target_ranks(
            hidden_ND, output.weight, batch.targets.target_ids,
            bias=output.bias, largest=largest_rank,
        )  # fmt: skip
        return self._loss_per_token(hidden_ND, batch), rank_N

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """[N, D] at the positions that predict the valid tokens."""
        hidden_BTD = self.model.base_model(
            input_ids=batch.input_ids, use_cache=False, **_attention_arguments(batch)
        ).last_hidden_state
        hidden_ND: Tensor = hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index)
        return hidden_ND


def _attention_arguments(batch: MicroBatch) -> dict[str, Any]:
    """What tells the body where traces begin."""
    arguments: dict[str, Any] = {}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    if batch.trace_ends is not None:  # or FlashAttention would wait for the device in every layer
        arguments["cu_seq_lens_q"] = arguments["cu_seq_lens_k"] = batch.trace_ends
        arguments["max_length_q"] = arguments["max_length_k"] = batch.longest
    return arguments
