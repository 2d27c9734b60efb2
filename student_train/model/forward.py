"""Computation of a micro-batch on a device: body and loss in one forward.

Letters: B rows, T positions, N loss tokens, D hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from student_train.batch.micro_batch import MicroBatch
from student_train.losses import (
    DEFAULT_OBJECTIVE,
    Objective,
    SparseKLOutput,
    chunk_likelihood_loss,
    outcome_logprobs,
    router_balance_loss,
    sparse_kl,
    sparse_kl_per_token,
    target_ranks,
)
from student_train.model.attention import known_rows
from student_train.model.load import HeadScaling, chosen_experts, output_layer
from student_train.model.own_traces import OWN_SUMS, OwnTraces

# Sums over loss tokens by StudentWithLoss, beside the loss; kl is the objective's divergence.
SUMS = ("kl", "ce", "student_mass", "teacher_mass", "top1_agreement")


def sum_names(
    num_sources: int, *, balances_experts: bool = False, has_own: bool = False
) -> tuple[str, ...]:
    """`SUMS`, the routers' loss, `OWN_SUMS`, and of several caches divergence and taught tokens."""
    names = (*SUMS, "router_aux_loss") if balances_experts else SUMS
    names = (*names, *OWN_SUMS) if has_own else names
    if num_sources == 1:
        return names
    numbers = range(1, num_sources + 1)
    return (*names, *(f"kl_cache_{n}" for n in numbers), *(f"tokens_cache_{n}" for n in numbers))


class StudentWithLoss(nn.Module):
    """Body and loss in one forward, so that a sharded head is whole where the loss uses it."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: HeadScaling,
        objective: Objective = DEFAULT_OBJECTIVE,
        *,
        num_sources: int = 1,
        matched_chunks_at: float | None = None,
        router_aux_loss_coef: float = 0.0,
        own_traces: OwnTraces | None = None,
    ) -> None:
        """Add the loss to a model.

        Args:
            model: The student.
            head: Scaling of its logits, which replaces the objective's softcap and logit_scale.
            objective: Objective to minimise.
            num_sources: Number of caches whose divergences are summed separately.
            matched_chunks_at: Temperature at which the likelihoods of chunks are matched instead
                of the objective's divergence; None for the divergence.
            router_aux_loss_coef: Weight of `router_balance_loss`, a mean over micro-batches with
                the weights of their tokens.
            own_traces: How tokens that the student sampled itself are learned from; None where
                no cache has any.

        Raises:
            ValueError: If the weight is not 0, and the model has no routers that tell.
        """
        super().__init__()
        self.model = model
        self._objective = replace(objective, softcap=head.softcap, logit_scale=head.logit_scale)
        # Held-out figures use the same divergence whatever the objective is.
        self._yardstick = replace(
            DEFAULT_OBJECTIVE, softcap=head.softcap, logit_scale=head.logit_scale
        )
        self._num_sources = num_sources
        self._matched_chunks_at = matched_chunks_at
        self._router_aux_loss_coef = router_aux_loss_coef
        if router_aux_loss_coef:
            self._num_chosen = chosen_experts(model)
        self._own_traces = own_traces

    def forward(self, batch: MicroBatch, loss_factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Args:
            batch: Micro-batch.
            loss_factor: Factor of the loss. Behind the loss it would cost one more pass over the
                gradient of the head's weight.

        Returns:
            The loss [], weighted and summed over loss tokens, and the detached sums over loss
            tokens, float64, of `sum_names`.
        """
        body = self._body(batch, with_routers=self._router_aux_loss_coef > 0)
        hidden_ND = _at_loss_tokens(body, batch)
        own_sums: list[Tensor] = []
        if self._own_traces is not None:
            weight_N = batch.token_weight if loss_factor == 1 else batch.token_weight * loss_factor
            output = output_layer(self.model)
            loss, result, own = self._own_traces.loss(
                hidden_ND, output.weight, output.bias, replace(batch, token_weight=weight_N),
                self._objective,
            )  # fmt: skip
            own_sums = [own]
        elif self._matched_chunks_at is None:
            output = output_layer(self.model)
            result = sparse_kl(
                hidden_ND,
                output.weight,
                batch.targets,
                batch.token_weight if loss_factor == 1 else batch.token_weight * loss_factor,
                self._objective,
                bias=output.bias,
                has_zero_weights=False,  # what is not learned from is no loss token
            )
            loss = result.loss
        else:
            label_alone = replace(self._objective, ce_weight=1.0)
            result = self._loss_per_token(hidden_ND, batch, label_alone)
            loss = chunk_likelihood_loss(
                result.loss,
                batch.token_weight,
                batch.chunks,
                ce_weight=self._objective.ce_weight,
                temperature=self._matched_chunks_at,
            )
            loss = loss * loss_factor if loss_factor != 1 else loss
        parts = (result.kl, result.ce, result.student_mass, result.teacher_mass, result.top1)
        sums = torch.stack([part.double().sum() for part in parts])
        if self._router_aux_loss_coef:
            aux_loss = self._router_aux_loss(batch, body)
            weight = self._router_aux_loss_coef * batch.token_weight.sum() * loss_factor
            loss = loss + weight * aux_loss
            sums = torch.cat([sums, batch.num_valid * aux_loss.detach().double()[None]])
        sums = torch.cat([sums, *own_sums])
        if self._num_sources > 1:
            sums = torch.cat([sums, self._sums_by_source(batch, result.kl)])
        return loss, sums

    def _router_aux_loss(self, batch: MicroBatch, body: ModelOutput) -> Tensor:
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        is_real_BT = positions < batch.row_lengths[:, None]
        return router_balance_loss(
            body["router_logits"], is_real_BT.flatten(), num_chosen=self._num_chosen
        )

    def _sums_by_source(self, batch: MicroBatch, kl_N: Tensor) -> Tensor:
        sums = kl_N.new_zeros(2, self._num_sources, dtype=torch.float64)
        sums[0].index_add_(0, batch.source, kl_N.double())
        sums[1].index_add_(0, batch.source, batch.targets.has_distribution().double())
        return sums.flatten()

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> SparseKLOutput:
        """Forward KL and cross entropy of each token [N], whatever the objective."""
        return self._loss_per_token(self._hidden(batch), batch, self._yardstick)

    def _loss_per_token(
        self, hidden_ND: Tensor, batch: MicroBatch, objective: Objective
    ) -> SparseKLOutput:
        output = output_layer(self.model)
        return sparse_kl_per_token(
            hidden_ND,
            output.weight,
            batch.targets,
            objective,
            bias=output.bias,
        )

    @torch.no_grad()
    def per_token_and_rank(
        self, batch: MicroBatch, *, largest_rank: int
    ) -> tuple[SparseKLOutput, Tensor]:
        """The objective's parts of each token [N], and the rank [N] of the target token."""
        output, hidden_ND = output_layer(self.model), self._hidden(batch)
        rank_N = target_ranks(
            hidden_ND, output.weight, batch.targets.target_ids,
            bias=output.bias, largest=largest_rank,
        )  # fmt: skip
        return self._loss_per_token(hidden_ND, batch, self._objective), rank_N

    @torch.no_grad()
    def per_token_and_outcomes(
        self, batch: MicroBatch, ids_NK: Tensor, is_kept_NK: Tensor
    ) -> tuple[SparseKLOutput, Tensor]:
        """Forward KL of each token [N], and logprobs [N, K + 1] of some ids and of all others."""
        output, hidden_ND = output_layer(self.model), self._hidden(batch)
        logprobs_NJ = outcome_logprobs(
            hidden_ND, output.weight, ids_NK, is_kept_NK, self._yardstick, bias=output.bias
        )
        return self._loss_per_token(hidden_ND, batch, self._yardstick), logprobs_NJ

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """[N, D] hidden states at the positions that predict the loss tokens."""
        return _at_loss_tokens(self._body(batch), batch)

    def _body(self, batch: MicroBatch, *, with_routers: bool = False) -> ModelOutput:
        arguments = _attention_arguments(batch)
        if with_routers:
            arguments["output_router_logits"] = True
        with known_rows(hold_several=batch.position_ids is not None):
            output: ModelOutput = self.model.base_model(
                input_ids=batch.input_ids, use_cache=False, **arguments
            )
        return output


def _at_loss_tokens(body: ModelOutput, batch: MicroBatch) -> Tensor:
    hidden_BTD: Tensor = body["last_hidden_state"]
    return hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index)


def _attention_arguments(batch: MicroBatch) -> dict[str, Any]:
    """Arguments that tell the body where traces begin."""
    arguments: dict[str, Any] = {}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    if batch.trace_ends is not None:  # or FlashAttention would wait for the device in every layer
        arguments["cu_seq_lens_q"] = arguments["cu_seq_lens_k"] = batch.trace_ends
        arguments["max_length_q"] = arguments["max_length_k"] = batch.longest
    if batch.lengths_in_row is not None:  # for the attention of `context_parallel`
        arguments["lengths_in_row"] = batch.lengths_in_row
    return arguments
