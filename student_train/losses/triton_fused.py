"""The whole row operation as one Triton kernel: a chunk's products in, losses and gradients out.

A program has a row: it takes the kept entries out, sums over the others in one sweep, evaluates
the loss and writes the gradient in a second one. The definition, in PyTorch, is
`rows.evaluate_rows`; names and formulas are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from student_train.losses.head import HeadProducts
from student_train.losses.rows import RowResults
from student_train.losses.targets import TeacherTargets
from student_train.losses.triton_math import divergence_terms, expm1, log_sigmoid
from student_train.losses.triton_sweeps import scaled, sum_tail, write_tail_gradient
from student_train.objective import DEFAULT_MIXES, Objective

BLOCK = 8192
NUM_WARPS = 16
# Chunks whose gradients are multiplied together: the weight's float32 gradient is read and
# written once for all of them.
CHUNKS_PER_PRODUCT = 4
_FEWEST_LANES = 64  # or every power of two below would be one more kernel to compile


class FusedRows:
    """`steps.RowSteps` in one launch per chunk, for a head that is whole.

    Gradients narrower than the logits are collected in a buffer of their own, several chunks of
    them; others take the place of the logits.
    """

    def __init__(
        self,
        objective: Objective,
        targets: TeacherTargets,
        head: HeadProducts,
        row_weight_N: Tensor | None,
    ) -> None:
        """Take what all chunks share; without `row_weight_N` there are no gradients."""
        self._objective = objective
        targets = targets.select(slice(None))  # a live teacher forms them here
        self._targets = TeacherTargets(
            targets.top_ids.contiguous(),
            targets.top_logits.contiguous(),
            targets.k.contiguous(),
            targets.tail_logit.contiguous(),
            targets.target_ids.contiguous(),
        )
        self._head = head
        self._row_weight_N = row_weight_N if row_weight_N is None else row_weight_N.contiguous()
        self._gradient_dtype = head.operand_dtype
        is_narrower = head.operand_dtype.itemsize < head.result_dtype.itemsize
        self._collects = is_narrower and row_weight_N is not None
        self._collected: Tensor | None = None

    @property
    def chunks_per_product(self) -> int:
        """Chunks whose gradients are multiplied together."""
        return CHUNKS_PER_PRODUCT if self._collects else 1

    def row_bytes(self, width: int) -> int:
        """Bytes of buffers per row of a chunk."""
        num_gradients = self.chunks_per_product if self._collects else 0
        dtype = self._head.result_dtype
        return width * (dtype.itemsize + num_gradients * self._gradient_dtype.itemsize)

    def __call__(
        self, first: int, start: int, logits_CV: Tensor, results: RowResults
    ) -> Tensor | None:
        """Evaluate the rows from `start`; see `steps.RowSteps`."""
        num_rows, width = logits_CV.shape
        rows = slice(start, start + num_rows)
        objective, targets, weight_N = self._objective, self._targets, self._row_weight_N
        gradient_CV = None
        if weight_N is not None:
            gradient_CV = self._gradient_buffer(logits_CV)[start - first : start - first + num_rows]
        num_kept = targets.top_ids.shape[1]
        _evaluate_row[(num_rows,)](
            logits_CV,
            gradient_CV,
            self._head.bias_V,
            targets.top_ids[rows],
            targets.top_logits[rows],
            targets.k[rows],
            targets.tail_logit[rows],
            targets.target_ids[rows],
            None if weight_N is None else weight_N[rows],
            results.kl[rows],
            results.ce[rows],
            results.student_mass[rows],
            results.top1[rows],
            logits_CV.stride(0),
            0 if gradient_CV is None else gradient_CV.stride(0),
            num_kept,
            self._head.num_vocab,
            width,
            divergence=objective.divergence,
            mix=DEFAULT_MIXES.get(objective.divergence) if objective.mix is None else objective.mix,
            tail=objective.tail,
            temperature=float(objective.temperature),
            ce_weight=float(objective.ce_weight),
            logit_scale=float(objective.logit_scale),
            softcap=None if objective.softcap is None else float(objective.softcap),
            lanes=max(triton.next_power_of_2(num_kept), _FEWEST_LANES),
            block=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
        if gradient_CV is None:
            return None
        return self._gradient_buffer(logits_CV)[: start - first + num_rows]

    def _gradient_buffer(self, logits_CV: Tensor) -> Tensor:
        """Gradients of the chunks of one product."""
        if not self._collects:
            return logits_CV
        if self._collected is None:  # the first chunk is the largest
            num_rows, width = logits_CV.shape
            num_rows = min(num_rows * self.chunks_per_product, len(self._targets))
            self._collected = logits_CV.new_empty(num_rows, width, dtype=self._gradient_dtype)
        return self._collected


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _evaluate_row(
    logits: tl.tensor,
    gradients: tl.tensor,
    bias: tl.tensor,
    top_ids: tl.tensor,
    top_logits: tl.tensor,
    num_kept_of_rows: tl.tensor,
    tail_logits: tl.tensor,
    target_ids: tl.tensor,
    row_weights: tl.tensor,
    kl_out: tl.tensor,
    ce_out: tl.tensor,
    mass_out: tl.tensor,
    top1_out: tl.tensor,
    stride: tl.tensor,
    gradient_stride: tl.tensor,
    kept_stride: tl.tensor,
    num_vocab: tl.tensor,
    width: tl.tensor,
    divergence: tl.constexpr,
    mix: tl.constexpr,
    tail: tl.constexpr,
    temperature: tl.constexpr,
    ce_weight: tl.constexpr,
    logit_scale: tl.constexpr,
    softcap: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Results of a row and, unless `gradients` is None, its gradient by the head's products."""
    row = tl.program_id(0).to(tl.int64)
    element = logits.dtype.element_ty
    z_row = logits + row * stride
    lane = tl.arange(0, lanes)
    k = tl.load(num_kept_of_rows + row).to(tl.int32)
    is_taught = k > 0
    kept = lane < tl.maximum(k, 1)
    ids = tl.load(top_ids + row * kept_stride + lane, mask=kept, other=0)
    label_id = tl.load(target_ids + row)
    is_label = kept & (ids == label_id)
    given = tl.load(top_logits + row * kept_stride + lane, mask=kept, other=float("-inf"))
    tail_logit = tl.load(tail_logits + row).to(element)
    tail_logit = tl.where(k >= num_vocab, float("-inf"), tail_logit)

    z = tl.load(z_row + ids, mask=kept, other=float("-inf"))
    z = scaled(z, bias, ids, kept, logit_scale, softcap)
    z_label = tl.load(z_row + label_id)
    z_label = scaled(z_label, bias, label_id, True, logit_scale, softcap)
    tl.debug_barrier()  # all have read before any takes a kept entry out of the tail
    tl.store(z_row + ids, float("-inf"), mask=kept)
    tl.debug_barrier()
    peak, rest, rest_tempered = sum_tail(
        z_row, bias, num_vocab, width, temperature, logit_scale, softcap, block
    )

    log_p, log_p_tail = _teacher(given.to(element), tail_logit, kept, tail, temperature)
    log_q1, log_q1_tail, label_logprob = _student(z, z_label, peak, rest, 1.0)
    if temperature != 1:
        log_q, log_q_tail, _ = _student(z, z_label, peak, rest_tempered, temperature)
    else:
        log_q, log_q_tail = log_q1, log_q1_tail
    terms, by_log_q = divergence_terms(log_p, log_q, divergence, mix)
    tail_term, by_log_q_tail = divergence_terms(log_p_tail, log_q_tail, divergence, mix)
    value = tl.sum(terms, axis=0) + tail_term
    if tail == "zero":  # the terms of the sum include + q - p, here 1 - P altogether
        value += expm1(log_sigmoid(-tail_logit))
    tl.store(kl_out + row, tl.where(is_taught, value * (temperature * temperature), 0.0))
    tl.store(ce_out + row, -label_logprob)
    tl.store(mass_out + row, tl.where(is_taught, -expm1(log_q1_tail), 0.0))
    # A tie is not agreement; among the teacher's own ties the first entry counts.
    is_likeliest = lane == tl.argmax(given, axis=0)
    likeliest = tl.max(tl.where(is_likeliest, z, float("-inf")), axis=0)
    others = tl.maximum(tl.max(tl.where(is_likeliest, float("-inf"), z), axis=0), peak)
    tl.store(top1_out + row, is_taught & (likeliest > others))

    if gradients is not None:
        weight = tl.load(row_weights + row)
        kl_weight = tl.where(is_taught, weight * ((1 - ce_weight) * temperature), 0.0)
        ce_weighted = weight * ce_weight
        total = tl.sum(by_log_q, axis=0) + by_log_q_tail
        kl_grad = tl.where(is_taught, (by_log_q - tl.exp(log_q) * total) * kl_weight, 0.0)
        kl_grad_tail = (by_log_q_tail - tl.exp(log_q_tail) * total) * kl_weight
        kl_grad_tail = tl.where(is_taught, kl_grad_tail, 0.0)
        # Minus all others, since q - 1 would lose the gradient of a label that is nearly certain.
        others_q = tl.where(is_label, 0.0, tl.exp(log_q1))
        q1_tail = tl.exp(log_q1_tail)
        ce_grad = tl.where(is_label, -(tl.sum(others_q, axis=0) + q1_tail), others_q) * ce_weighted
        ce_grad_tail = q1_tail * ce_weighted
        values = kl_grad + ce_grad
        label_value = (
            kl_grad_tail * tl.exp((z_label - peak) / temperature - rest_tempered)
            + ce_grad_tail * tl.exp(z_label - peak - rest)
            - ce_weighted
        )
        if softcap is not None:
            values *= 1 - (z / softcap) * (z / softcap)
            label_value *= 1 - (z_label / softcap) * (z_label / softcap)
        factor = kl_grad_tail
        if temperature == 1:
            factor += ce_grad_tail
        out_row = gradients + row * gradient_stride
        write_tail_gradient(
            z_row, out_row, bias, peak, rest, rest_tempered,
            factor * logit_scale, ce_grad_tail * logit_scale,
            num_vocab, width, temperature, logit_scale, softcap,
            is_capped=False, is_packed=False, block=block,
        )  # fmt: skip
        tl.debug_barrier()  # the kept entries and the label come last
        narrow = out_row.dtype.element_ty
        tl.store(out_row + ids, (values * logit_scale).to(narrow), mask=kept)
        is_label_kept = tl.max(is_label.to(tl.int32), axis=0) > 0
        tl.store(out_row + label_id, (label_value * logit_scale).to(narrow), mask=~is_label_kept)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _teacher(
    top_logits: tl.tensor,
    tail_logit: tl.tensor,
    kept: tl.tensor,
    tail: tl.constexpr,
    temperature: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The teacher's log-probabilities of the kept entries and of the tail."""
    z = tl.where(kept, top_logits / temperature, float("-inf"))
    shifted = z - tl.max(z, axis=0)
    log_p = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
    if tail != "renormalise":
        log_p += log_sigmoid(-tail_logit)
    if tail == "bucket":
        log_p_tail = log_sigmoid(tail_logit)
    else:
        log_p_tail = tl.full((), float("-inf"), top_logits.dtype)
    return log_p, log_p_tail


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _student(
    z: tl.tensor, z_label: tl.tensor, peak: tl.tensor, rest: tl.tensor, temperature: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The student's log-probabilities of the kept entries, of the tail and of the label."""
    top = tl.maximum(tl.max(z, axis=0), peak)
    kept = (z - top) / temperature
    tail_lse = (peak - top) / temperature + rest
    largest = tl.max(kept, axis=0)
    kept_lse = largest + tl.log(tl.sum(tl.exp(kept - largest), axis=0))
    offset = log_sigmoid(kept_lse - tail_lse) - kept_lse
    log_q_label = (z_label - top) / temperature + offset
    return kept + offset, log_sigmoid(tail_lse - kept_lse), log_q_label
