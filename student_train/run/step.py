"""Computation of one step, over all processes: counts, gradients, totals, and logged figures."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from student_train.batch.micro_batch import MicroBatch, empty_micro_batch, normaliser
from student_train.batch.prepared import PreparedStep
from student_train.data.prefetch import Prefetch
from student_train.model.forward import SUMS, sum_names
from student_train.model.own_traces import OWN_SUMS
from student_train.run.setup import Run
from student_train.run.sharding import without_exchange


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of a global batch, over all processes."""

    num_valid: int  # tokens that enter the loss
    num_traces: int  # with such a token
    num_absent: int  # kept entries whose id the student lacks
    num_distributions: int  # loss tokens that have one
    num_hard_labels: int  # loss tokens that their label alone teaches
    num_left_out: int  # selected tokens that nothing teaches
    num_batches: int  # the most micro-batches of one process


@dataclass(frozen=True)
class StepTotals:
    """Sums of a step over all processes."""

    sums: Mapping[str, float]  # the loss, normalised, and those of `sum_names`, which are not
    flops: int
    bytes_read: int  # from shards since this process started
    is_asked_to_stop: bool  # some process is


def global_counts(accelerator: Accelerator, batches: Sequence[MicroBatch]) -> GlobalCounts:
    """Count all processes' micro-batches of a step; every process calls it."""
    counts = [
        (b.num_valid, b.num_traces, b.num_absent, b.num_distributions, b.num_hard_labels,
         b.num_left_out, 1)
        for b in batches
    ]  # fmt: skip
    local = torch.tensor(counts, dtype=torch.int64, device=accelerator.device).reshape(-1, 7)
    counts_R7 = accelerator.gather(local.sum(dim=0, keepdim=True))
    num_valid, num_traces, num_absent, num_distributions, num_hard_labels, num_left_out, _ = (
        counts_R7.sum(dim=0).tolist()
    )
    return GlobalCounts(
        num_valid,
        num_traces,
        num_absent,
        num_distributions,
        num_hard_labels,
        num_left_out,
        int(counts_R7[:, -1].max()),
    )


def add_gradients(run: Run, batches: Sequence[MicroBatch], counts: GlobalCounts) -> Tensor:
    """Run forward and backward of every micro-batch of a step; every process runs as many.

    Returns:
        [1 + sums] float64, this process' loss and the sums that `sum_names` lists.
    """
    accelerator = run.inputs.accelerator
    divisor = normaliser(counts.num_valid, counts.num_traces, run.inputs.config.loss_reduction)
    sums = torch.zeros(len(_names(run)), dtype=torch.float64, device=accelerator.device)
    for index in range(counts.num_batches if counts.num_valid else 0):
        batch = batches[index] if index < len(batches) else empty_micro_batch()
        batch = batch.to(accelerator.device)
        if run.teacher is not None:
            batch = run.teacher.taught(batch)
        is_last = index == counts.num_batches - 1
        with without_exchange(run.student, accelerator, is_last=is_last):
            inside, outside = _loss_factors(accelerator, divisor)
            loss, parts = run.student(batch, inside)
            accelerator.backward(loss * outside)
        share = loss.detach().double()[None] / (inside * divisor)
        sums += torch.cat([share, parts.double()])
    return sums


def _loss_factors(accelerator: Accelerator, divisor: int) -> tuple[float, float]:
    """Factors of the loss within the student's forward, and behind it.

    Ranks average their gradients; the loss is one sum over all of them. On a GPU all of the factor
    is part of the tokens' weights, since behind the loss only 1 costs nothing.
    """
    factor = accelerator.num_processes / divisor
    return (factor, 1.0) if accelerator.device.type == "cuda" else (1.0, factor)


def _names(run: Run) -> tuple[str, ...]:
    """Names of the loss and of the sums beside it."""
    data, config = run.inputs.data, run.inputs.config
    names = sum_names(
        len(data.sources),
        balances_experts=config.router_aux_loss_coef > 0,
        has_own=data.has_own_traces,
    )
    return ("loss", *names)


def all_reduced(
    run: Run, sums: Tensor, *, flops: int, bytes_read: int, signal_number: int
) -> StepTotals:
    """Sum all processes' shares of a step; every process calls it and waits for the others."""
    local = torch.cat([sums, sums.new_tensor([flops, bytes_read, signal_number])])
    *totals, all_flops, all_bytes, all_signals = run.inputs.accelerator.reduce(
        local, "sum"
    ).tolist()
    named = dict(zip(_names(run), totals, strict=True))
    return StepTotals(named, int(all_flops), int(all_bytes), all_signals > 0)


class StepFigures:
    """Clocks and counts behind a step's line of metrics; every process has them."""

    def __init__(self, run: Run, stream: Prefetch[PreparedStep]) -> None:
        self._run = run
        self._stream = stream
        self._step_began_s = time.perf_counter()
        self._begin_line(self._step_began_s)

    def _begin_line(self, now_s: float) -> None:
        self._line_began_s, self._wait_began_s = now_s, self._stream.wait_s
        self._num_tokens = 0

    def begin_step(self) -> None:
        """Start the clock of a step; time since the end of the last one does not count."""
        self._step_began_s = time.perf_counter()

    def end_step(self, num_valid: int) -> float:
        """Stop the clock.

        Returns:
            Seconds that the step took, its wait for data included.
        """
        self._step_ended_s = time.perf_counter()
        self._num_tokens += num_valid
        return self._step_ended_s - self._step_began_s

    def line(
        self, totals: StepTotals, counts: GlobalCounts, *, grad_norm: float, lr: float
    ) -> dict[str, Any]:
        """The figures of the last step, and rates since the line before."""
        run, state = self._run, self._run.state
        elapsed_s = self._step_ended_s - self._line_began_s
        waited_s = self._stream.wait_s - self._wait_began_s
        figures = {
            "step": state.step,
            "epoch": state.step / run.steps_per_epoch,
            "loss": totals.sums["loss"],
            **{name: totals.sums[name] / max(1, counts.num_distributions) for name in SUMS},
            "ce": totals.sums["ce"] / max(1, counts.num_valid),
            **_of_routers(totals.sums, counts.num_valid),
            **_of_each_cache(totals.sums),
            **_of_own_traces(totals.sums, counts.num_valid),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": counts.num_valid,
            "num_hard_labels": state.num_hard_labels,
            "num_left_out_tokens": state.num_left_out,
            "num_empty_steps": state.num_empty_steps,
            "num_empty_traces": state.num_empty_traces,
            "num_absent_entries": state.num_absent,
            "tokens_trained": state.num_tokens,
            "bytes_read": state.bytes_read,
            "flops": state.flops,
            "peak_memory_bytes": run.inputs.memory.peak_bytes,
            "train_s": state.train_s,
            "tokens_per_s": self._num_tokens / elapsed_s,
            "data_wait_share": waited_s / elapsed_s,
            "cot_share": run.spans.cot_share,
            "mean_lead_span": run.spans.mean_lead_span,
            "whole_trace_share": run.spans.whole_trace_share,
        }
        self._begin_line(self._step_ended_s)
        return figures


def _of_routers(sums: Mapping[str, float], num_valid: int) -> dict[str, float]:
    """Mean of the routers' auxiliary loss, where it is part of the loss."""
    name = "router_aux_loss"
    return {name: sums[name] / max(1, num_valid)} if name in sums else {}


def _of_each_cache(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean divergence of every mixed cache with tokens in the step, numbered by --cache from 1."""
    prefix = "tokens_cache_"
    counts = {name.removeprefix(prefix): n for name, n in sums.items() if name.startswith(prefix)}
    return {f"kl_cache_{n}": sums[f"kl_cache_{n}"] / count for n, count in counts.items() if count}


def _of_own_traces(sums: Mapping[str, float], num_valid: int) -> dict[str, float]:
    """Means over the tokens that the student sampled, and their share of the loss tokens."""
    if "own_tokens" not in sums:
        return {}
    num_own = sums["own_tokens"]
    means = {name: sums[name] / max(1.0, num_own) for name in OWN_SUMS if name != "own_tokens"}
    return {**means, "own_token_share": num_own / max(1, num_valid)}
