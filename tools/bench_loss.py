"""The loss against its rivals: time, memory above the inputs, and error of the gradients.

    python tools/bench_loss.py --device cpu
    python tools/bench_loss.py --device cuda --json bench_loss.json

A step is forward and backward with gradients of hidden states and weight. Times are medians of
steps of all variants in turn; a variant that takes over ten times ours runs only twice. Memory
is the peak above inputs and teacher data, gradients included: the allocator's on CUDA, and on the
CPU the peak resident size of a fresh process in its second step. The error is that of both
gradients against float64, relative and by norm, over 64 tokens. Ratios are to the dense formula
(naive) and to plain cross entropy in our own chunk loop.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_json import write_figures
from torch import Tensor
from torch.nn import functional as F

from student_train.losses import TeacherTargets, chunks, sparse_kl, sparse_kl_per_token
from student_train.losses.head import HeadProducts
from student_train.losses.rows import RowGradients, TorchPasses
from student_train.objective import Objective

NUM_ERROR_TOKENS = 64
SLOW = 10  # times our step, from which on a variant is timed once
KL_ALONE = Objective(ce_weight=0.0)  # as the rivals are timed
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Sizes of one table."""

    device: str
    dtype: str
    tokens: int
    hidden: int
    vocab: int
    kept: int


@dataclass(frozen=True)
class Case:
    """Operands that require gradients, and the teacher."""

    hidden: Tensor
    weight: Tensor
    targets: TeacherTargets
    token_weight: Tensor

    def first(self, num_tokens: int, dtype: torch.dtype) -> Case:
        """The first tokens as a case of their own, in another dtype."""
        rows = slice(num_tokens)
        return Case(
            self.hidden.detach()[rows].to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.targets.select(rows),
            torch.full_like(self.token_weight[rows], 1 / num_tokens),
        )

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of a step, removed from the operands."""
        hidden, weight = self.hidden.grad, self.weight.grad
        if hidden is None or weight is None:
            raise RuntimeError("a variant left an operand without a gradient")
        self.hidden.grad = self.weight.grad = None
        return hidden, weight


def make_case(sizes: Sizes) -> Case:
    device, dtype = sizes.device, getattr(torch, sizes.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    hidden = normal(sizes.tokens, sizes.hidden, scale=1.0)
    weight = normal(sizes.vocab, sizes.hidden, scale=2.0 / sizes.hidden**0.5)
    # Distinct within a row and spread over the vocabulary, without a permutation per row.
    first = torch.randint(sizes.vocab, (sizes.tokens, 1), generator=generator, device=device)
    steps = torch.arange(sizes.kept, device=device) * (sizes.vocab // sizes.kept)
    gaps = torch.rand(sizes.tokens, sizes.kept, generator=generator, device=device) * 0.4
    ids = (first + steps) % sizes.vocab
    targets = TeacherTargets(
        top_ids=ids,
        top_logits=gaps[:, :1] - gaps.cumsum(dim=1),
        k=torch.full((sizes.tokens,), sizes.kept, device=device),
        tail_logit=torch.full((sizes.tokens,), -4.0, device=device),
        target_ids=ids[:, 0].contiguous(),
    )
    weights = torch.full((sizes.tokens,), 1 / sizes.tokens, device=device)
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, weights)


def fused(case: Case) -> None:
    sparse_kl(case.hidden, case.weight, case.targets, case.token_weight, KL_ALONE).loss.backward()


def fused_in_pytorch(case: Case) -> None:
    chosen, chunks.passes_type = chunks.passes_type, lambda device_type: TorchPasses
    try:
        fused(case)
    finally:
        chunks.passes_type = chosen


def recompute(case: Case) -> None:
    losses = sparse_kl_per_token(case.hidden, case.weight, case.targets, KL_ALONE).loss
    (losses * case.token_weight).sum().backward()


def dense_kl(
    hidden: Tensor, weight: Tensor, ids: Tensor, log_p: Tensor, log_p_tail: Tensor
) -> Tensor:
    """As commonly written: all logits, log-softmax, and the tail as one minus the rest."""
    logits = F.linear(hidden, weight)
    log_q = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    log_q = log_q.gather(1, ids)
    log_q_tail = torch.log1p(-log_q.exp().sum(dim=1).clamp(max=1 - 1e-6))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return (kl + log_p_tail.exp() * (log_p_tail - log_q_tail)).mean()


def naive(case: Case, function: Callable[..., Tensor] = dense_kl) -> None:
    targets = case.targets
    log_p = targets.top_logits.log_softmax(dim=1) + F.logsigmoid(-targets.tail_logit)[:, None]
    log_p_tail = F.logsigmoid(targets.tail_logit)
    function(case.hidden, case.weight, targets.top_ids, log_p, log_p_tail).backward()


@functools.cache
def compiled_dense_kl() -> Callable[..., Tensor]:
    """Compile on first use: importing the compiler takes a second."""
    return torch.compile(dense_kl)


def naive_compiled(case: Case) -> None:
    naive(case, compiled_dense_kl())


def naive_ce(case: Case) -> None:
    F.cross_entropy(F.linear(case.hidden, case.weight), case.targets.target_ids).backward()


def chunked_ce(case: Case) -> None:
    """Plain cross entropy in the loop of our loss: its head, buffer and row passes."""
    hidden, weight, labels = case.hidden, case.weight, case.targets.target_ids
    head = HeadProducts(hidden.detach(), weight.detach(), None, hidden.dtype, (True, True, False))
    num_tokens, num_vocab, device = len(hidden), len(weight), hidden.device
    passes_type = chunks.passes_type(device.type)
    width = chunks.buffer_width(num_vocab)
    row_bytes = passes_type.row_bytes(KL_ALONE, width, head.result_dtype, head.operand_dtype)
    num_rows = chunks.rows_per_chunk(num_tokens, row_bytes, None, device.type)
    buffer = torch.empty(num_rows, width, device=device, dtype=head.result_dtype)
    loss = torch.zeros((), device=device)
    for start in range(0, num_tokens, num_rows):
        stop = min(start + num_rows, num_tokens)
        logits, label = buffer[: stop - start], labels[start:stop, None]
        head.products_(start, stop, logits[:, :num_vocab])
        logits[:, num_vocab:] = -torch.inf
        passes = passes_type(KL_ALONE)
        label_logit = logits.gather(1, label)[:, 0]
        sums = passes.reduce_(logits)
        logprob = label_logit - sums.peak - sums.rest
        loss -= logprob.sum()
        row_weight = case.token_weight[start:stop]
        values = (row_weight * logprob.expm1())[:, None]
        gradients = RowGradients(row_weight, row_weight, label, values)
        gradient = passes.gradient_(logits, gradients, head.operand_dtype)
        head.accumulate_(start, stop, gradient[:, :num_vocab])
    if head.grad_hidden is None or head.grad_weight is None:
        raise RuntimeError("the head was asked for both gradients")
    hidden.grad = head.grad_hidden.to(hidden.dtype)
    weight.grad = head.grad_weight.to(weight.dtype)


def torch_ce(case: Case) -> None:
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(
        case.hidden, case.weight, case.targets.target_ids, options=options
    ).backward()


def liger_ce(case: Case) -> None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    loss(case.weight, case.hidden, case.targets.target_ids).backward()


def liger_kl(case: Case) -> None:
    """Loss against a dense teacher, as Liger requires, without the tail."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    targets, num_vocab = case.targets, len(case.weight)
    dense = case.hidden.new_zeros(len(case.hidden), num_vocab)
    dense.scatter_(1, targets.top_ids, targets.top_logits.softmax(dim=1).to(dense.dtype))
    loss = LigerFusedLinearKLDivLoss(accum_dtype=torch.float32)
    loss(case.hidden, case.weight, dense).backward()


Variant = Callable[[Case], None]
VARIANTS: dict[str, tuple[Variant, Variant | None]] = {
    # name: the step, and what defines its gradient; None where it is neither of the two
    "sparse_kl": (fused, naive),
    "sparse_kl_per_token": (recompute, naive),
    "naive": (naive, naive),
    "naive_compiled": (naive_compiled, naive),
    "chunked_ce": (chunked_ce, naive_ce),
    "torch_linear_ce": (torch_ce, naive_ce),
}
ON_CUDA: dict[str, tuple[Variant, Variant | None]] = {
    "sparse_kl_pytorch": (fused_in_pytorch, naive),
    "liger_linear_ce": (liger_ce, naive_ce),
    "liger_linear_kl": (liger_kl, None),
}


NEEDED = ("sparse_kl", "naive", "chunked_ce")  # for the ratios


def available(device: str) -> dict[str, tuple[Variant, Variant | None]]:
    found = dict(VARIANTS)
    if not hasattr(F, "linear_cross_entropy"):
        del found["torch_linear_ce"]
    if device == "cuda":
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        found.update((k, v) for k, v in ON_CUDA.items() if has_liger or "liger" not in k)
    return found


def timed_ms(step: Variant, case: Case) -> float:
    on_cuda = case.hidden.is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(case)
    if on_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    case.take_gradients()
    return elapsed * 1e3


def peak_extra_bytes(step: Variant, case: Case) -> int:
    """Peak of the second step: the first may compile, and fills lasting caches."""
    step(case)
    case.take_gradients()
    if case.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(case)
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_bytes("VmRSS")
        step(case)
        peak = resident_bytes("VmHWM")
    case.take_gradients()
    return peak - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_in_fresh_process(name: str, sizes: Sizes) -> int:
    arguments = [f"--{key}={value}" for key, value in vars(sizes).items()]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, f"--memory-of={name}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def gradient_error(step: Variant, definition: Variant, case: Case) -> float:
    num_tokens = min(NUM_ERROR_TOKENS, len(case.hidden))
    exact = case.first(num_tokens, torch.float64)
    exact = replace(exact, targets=in_float64(exact.targets))
    definition(exact)
    truths = exact.take_gradients()
    rounded = case.first(num_tokens, case.hidden.dtype)
    step(rounded)
    return max(
        float((one.double() - truth).norm() / truth.norm())
        for one, truth in zip(rounded.take_gradients(), truths, strict=True)
    )


def in_float64(targets: TeacherTargets) -> TeacherTargets:
    top_logits, tail_logit = targets.top_logits.double(), targets.tail_logit.double()
    return replace(targets, top_logits=top_logits, tail_logit=tail_logit)


Rows = list[dict[str, object]]


def measure(
    sizes: Sizes,
    repeats: int,
    variants: dict[str, tuple[Variant, Variant | None]],
    save: Callable[[Rows], None],
    *,
    with_memory: bool,
) -> Rows:
    """Time, error and memory of every variant; `save` gets what there is after each round."""
    case = make_case(sizes)
    times: dict[str, list[float]] = {name: [] for name in variants}
    errors: dict[str, float | None] = {}
    peaks: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, (step, _) in variants.items():
            if repeat > 1 and times[name][1] > SLOW * times["sparse_kl"][1]:
                continue
            elapsed = timed_ms(step, case)
            print(f"round {repeat}/{repeats} {name}: {elapsed:.1f} ms", file=sys.stderr)
            times[name].append(elapsed)
        if repeat:  # the first round warms up
            save(rows_of(times, errors, peaks))
    for name, (step, definition) in variants.items():
        errors[name] = None if definition is None else gradient_error(step, definition, case)
    save(rows_of(times, errors, peaks))
    if not with_memory:
        return rows_of(times, errors, peaks)
    if sizes.device == "cuda":
        peaks.update({name: peak_extra_bytes(step, case) for name, (step, _) in variants.items()})
    else:
        del case  # each process has one of its own
        peaks.update({name: peak_in_fresh_process(name, sizes) for name in variants})
    return rows_of(times, errors, peaks)


def rows_of(
    times: dict[str, list[float]], errors: dict[str, float | None], peaks: dict[str, int]
) -> Rows:
    """One row per variant; None for what was not measured yet."""
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    return [
        {
            "name": name,
            "ms": medians[name],
            "peak_extra_bytes": peaks.get(name),
            "grad_rel_error": errors.get(name),
            "time_ratio_vs_naive": medians[name] / medians["naive"],
            "memory_ratio_vs_naive": peaks[name] / peaks["naive"] if peaks else None,
            "time_ratio_vs_plain_ce": medians[name] / medians["chunked_ce"],
        }
        for name in medians
    ]


def print_table(sizes: Sizes, rows: list[dict[str, object]]) -> None:
    print(
        f"\n{sizes.device} {sizes.dtype}: {sizes.tokens} tokens, hidden size {sizes.hidden}, "
        f"vocabulary {sizes.vocab}, {sizes.kept} kept"
    )
    print(f"{'':22}{'ms':>9}{'MiB':>8}{'/naive ms':>11}{'MiB':>7}{'/CE ms':>8}{'error':>10}")
    for row in rows:
        error = "-" if row["grad_rel_error"] is None else f"{row['grad_rel_error']:.1e}"
        peak, ratio = row["peak_extra_bytes"], row["memory_ratio_vs_naive"]
        memory = f"{'-':>8}" if peak is None else f"{peak / MIB:>8.0f}"
        print(
            f"{row['name']:22}{row['ms']:>9.1f}{memory}{row['time_ratio_vs_naive']:>11.2f}"
            f"{'-' if ratio is None else f'{ratio:.2f}':>7}"
            f"{row['time_ratio_vs_plain_ce']:>8.2f}{error:>10}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--dtype", help="float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--tokens", type=int, help="1024 on the CPU, 8192 on CUDA")
    parser.add_argument("--hidden", type=int, nargs="*", help="512 on the CPU, 1024 2048 4096")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    others = [name for name in (*VARIANTS, *ON_CUDA) if name not in NEEDED]
    parser.add_argument("--without", nargs="+", choices=others, default=[], metavar="VARIANT")
    parser.add_argument("--no-memory", action="store_true", help="on a CPU, a process for each row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a CPU run starts itself with it
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    on_cuda = arguments.device == "cuda"
    dtype = arguments.dtype or ("bfloat16" if on_cuda else "float32")
    tokens = arguments.tokens or (8192 if on_cuda else 1024)
    variants = available(arguments.device)
    variants = {name: v for name, v in variants.items() if name not in arguments.without}
    hidden_sizes = arguments.hidden or ([1024, 2048, 4096] if on_cuda else [512])
    tables = []
    for hidden in hidden_sizes:
        sizes = Sizes(arguments.device, dtype, tokens, hidden, arguments.vocab, arguments.kept)
        if arguments.memory_of is not None:
            step, _ = available(sizes.device)[arguments.memory_of]
            print(peak_extra_bytes(step, make_case(sizes)))
            return
        table = {"name": f"hidden {hidden}", **vars(sizes)}
        save = functools.partial(write, arguments.json, on_cuda, tables, table)
        rows = measure(
            sizes, arguments.repeats, variants, save, with_memory=not arguments.no_memory
        )
        print_table(sizes, rows)
        save(rows)
        tables.append({**table, "rows": rows})


def write(
    file: Path | None, on_cuda: bool, tables: Rows, table: dict[str, object], rows: Rows
) -> None:
    """Write all tables, the last of which may still grow."""
    tables = [*tables, {**table, "rows": rows}]
    # The figures of our loss at the middle size stand first, for scripts.
    headline = {k: v for k, v in tables[len(tables) // 2]["rows"][0].items() if k != "name"}
    machine = torch.cuda.get_device_name() if on_cuda else platform.processor()
    about = {
        "torch": torch.__version__,
        "machine": machine or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    write_figures(file, {**headline, **about, "tables": tables})


if __name__ == "__main__":
    main()
