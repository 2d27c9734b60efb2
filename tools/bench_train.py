"""A training step at several lead spans: time, peak memory, and the parts of the time.

    python tools/bench_train.py --device cpu
    python tools/bench_train.py --device cuda --shape 1.7b --tokens 8192 --json bench_train.json

A step is what `train-student run` does with a global batch that has been read: micro-batches, the
way to the device, forward with loss, backward, clipping, AdamW. The student has a Qwen3's shape and
random weights, the traces are random too. Times are medians of steps of all lead spans in turn.
Peak memory is that of a step after the first, weights and optimizer included: the allocator's on
CUDA, and on the CPU the resident size of a fresh process above its libraries. Shares of data, loss
and optimizer are of a separate step, which waits for the device after every part.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_json import write_figures
from bench_loss import resident_bytes
from transformers import Qwen3Config, Qwen3ForCausalLM

import student_train.model.forward as forward_module
from student_train.batch.micro_batch import micro_batches, normaliser
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of
from teacher_cache.format import Trace

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads, head size, vocabulary
    "tiny": (64, 128, 2, 2, 1, 32, 1024),
    "small": (512, 1536, 6, 8, 4, 64, 32_768),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "1.7b": (2048, 6144, 28, 16, 8, 128, 151_936),
}
MIB = 2**20


def make_model(shape: str, num_positions: int, device: torch.device) -> Qwen3ForCausalLM:
    hidden, mlp, layers, heads, key_value_heads, head, vocab = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=head,
        vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=num_positions,
    )  # fmt: skip
    with device:  # billions of random numbers take a CPU the better part of a minute
        return Qwen3ForCausalLM(config)


def random_trace(name: str, num_tokens: int, vocab: int, kept: int) -> Trace:
    rng = np.random.default_rng([num_tokens, len(name)])
    first = rng.integers(vocab, size=(num_tokens, 1))
    ids = (first + np.arange(kept) * (vocab // kept)) % vocab  # distinct within a token
    k = np.full(num_tokens, kept, np.uint8)
    k[0] = 0
    return Trace(
        trace_id=name,
        token_ids=ids[:, 0].astype(np.int32),
        n_total=num_tokens,
        cot_start=num_tokens // 20,
        answer_start=num_tokens * 19 // 20,
        k=k,
        top_ids=ids[1:].astype(np.int32).ravel(),
        top_logits=np.tile(-0.25 * np.arange(kept, dtype=np.float32), num_tokens - 1),
        tail_logit=np.where(k > 0, -7.0, 0.0).astype(np.float32),
    )


class Step:
    """One student and its optimizer; a step at any lead span."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.libraries_bytes = resident_bytes("VmRSS") if arguments.device == "cpu" else 0
        model = make_model(arguments.shape, arguments.tokens, self.device)
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.student = StudentWithLoss(model, head_of(model))
        self.student.train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        self.is_half = arguments.dtype == "bfloat16"
        self.batch_tokens = arguments.batch_tokens
        vocab = SHAPES[arguments.shape][-1]
        self.traces = [
            random_trace(f"t{number}", arguments.tokens, vocab, arguments.kept)
            for number in range(arguments.traces)
        ]
        self.parts_s = dict.fromkeys(("data", "loss", "optimizer"), 0.0)

    def now_s(self) -> float:
        """The time at which the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, lead_span: float, *, apart: bool = False) -> tuple[float, int]:
        """Run a step; return seconds and loss tokens. `apart` fills `parts_s`, which slows it."""
        watch: Callable[[], float] = self.now_s if apart else lambda: 0.0
        started_s = self.now_s()
        selection = TokenSelection(lead_span)
        at_s = watch()
        batches = micro_batches(
            selection.selected(self.traces), batch_tokens=self.batch_tokens, loss_reduction="token"
        )
        data_s = watch() - at_s
        num_valid = sum(batch.num_valid for batch in batches)
        divisor = normaliser(num_valid, len(self.traces), "token")
        for batch in batches:
            at_s = watch()
            batch = batch.to(self.device)
            data_s += watch() - at_s
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
                loss, _ = self.student(batch, 1 / divisor)
            loss.backward()
        at_s = watch()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.parts_s["data"], self.parts_s["optimizer"] = data_s, watch() - at_s
        return self.now_s() - started_s, num_valid

    def shares(self, lead_span: float) -> dict[str, float]:
        """Shares of a step's time; the loss includes its gradients, formed in the forward."""
        original = forward_module.sparse_kl
        self.parts_s["loss"] = 0.0

        def timed(*args: object, **settings: object) -> object:
            started_s = self.now_s()
            result = original(*args, **settings)
            self.parts_s["loss"] += self.now_s() - started_s
            return result

        forward_module.sparse_kl = timed
        try:
            whole_s, _ = self.run(lead_span, apart=True)
        finally:
            forward_module.sparse_kl = original
        return {f"{name}_share": value / whole_s for name, value in self.parts_s.items()}

    def peak_bytes(self, lead_span: float) -> int:
        """Peak of a step, with everything that stays between steps."""
        self.run(lead_span)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.run(lead_span)
            return torch.cuda.max_memory_allocated()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.run(lead_span)
        return resident_bytes("VmHWM") - self.libraries_bytes


def peak_in_fresh_process(lead_span: float) -> int:
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", str(lead_span)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Time, memory and shares at every lead span of `arguments`, and their settings.

    What there is after a round is written already.
    """
    step = Step(arguments)
    # Weights, gradients and AdamW's two moments: no lead span makes them smaller.
    state_bytes = 4 * sum(p.numel() * p.element_size() for p in step.student.parameters())
    on_cuda = arguments.device == "cuda"
    about = {
        **{name: getattr(arguments, name) for name in SETTINGS},
        "state_bytes": state_bytes,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    times: dict[float, list[float]] = {lead_span: [] for lead_span in arguments.lead_spans}
    tokens = {}
    for repeat in range(arguments.repeats + 1):
        for lead_span, found in times.items():
            elapsed_s, tokens[lead_span] = step.run(lead_span)
            print(
                f"round {repeat}/{arguments.repeats} lead span {lead_span:g}: {elapsed_s:.3f} s",
                file=sys.stderr,
            )
            if repeat:  # the first round warms up
                found.append(elapsed_s)
        if repeat:
            write_figures(arguments.json, {**about, "rows": _times(times, tokens)})
    rows = [{**row, **step.shares(row["lead_span"])} for row in _times(times, tokens)]
    if arguments.no_memory:
        return {**about, "rows": rows}
    if on_cuda:
        peaks = [step.peak_bytes(row["lead_span"]) for row in rows]
    else:
        del step  # each process has one of its own
        peaks = [peak_in_fresh_process(row["lead_span"]) for row in rows]
    for row, peak in zip(rows, peaks, strict=True):
        row["peak_bytes"] = peak
        row["memory_ratio"] = peak / peaks[0]
        row["memory_ratio_above_state"] = (peak - state_bytes) / (peaks[0] - state_bytes)
    return {**about, "rows": rows}


def _times(times: dict[float, list[float]], tokens: dict[float, int]) -> list[dict[str, Any]]:
    """Rows with the times alone, the first lead span being the one that others are compared to."""
    medians = {lead_span: statistics.median(found) for lead_span, found in times.items()}
    first_s = next(iter(medians.values()))
    return [
        {
            "name": f"{lead_span:g}",
            "lead_span": lead_span,
            "step_s": median_s,
            "tokens": tokens[lead_span],
            "tokens_per_s": tokens[lead_span] / median_s,
            "time_ratio": median_s / first_s,
        }
        for lead_span, median_s in medians.items()
    ]


def print_table(result: dict[str, object]) -> None:
    print(
        f"{result['device']} {result['dtype']}, Qwen3 shape {result['shape']}: {result['traces']} "
        f"traces of {result['tokens']} tokens, {result['kept']} kept; weights, gradients and "
        f"AdamW {result['state_bytes'] / MIB:,.0f} MiB"
    )
    print(
        f"{'lead span':>9}{'ms':>10}{'ratio':>7}{'tok/s':>10}{'peak MiB':>10}{'ratio':>7}"
        f"{'less state':>11}{'loss':>7}{'data':>7}{'optim.':>8}"
    )
    for row in result["rows"]:
        memory = f"{'-':>10}{'-':>7}{'-':>11}"
        if "peak_bytes" in row:
            memory = (
                f"{row['peak_bytes'] / MIB:>10,.0f}{row['memory_ratio']:>7.2f}"
                f"{row['memory_ratio_above_state']:>11.2f}"
            )
        print(
            f"{row['lead_span']:>9g}{row['step_s'] * 1e3:>10,.0f}{row['time_ratio']:>7.2f}"
            f"{row['tokens_per_s']:>10,.0f}{memory}"
            f"{row['loss_share']:>7.0%}{row['data_share']:>7.1%}{row['optimizer_share']:>8.0%}"
        )


SETTINGS = (
    "device", "dtype", "shape", "tokens", "traces", "batch_tokens", "kept",
    "gradient_checkpointing",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on CUDA")
    parser.add_argument("--shape", choices=list(SHAPES), help="small on the CPU, 0.6b on CUDA")
    parser.add_argument("--lead-spans", type=float, nargs="+", help="1.0 0.5 and on CUDA 0.25")
    parser.add_argument("--tokens", type=int, help="of a trace; 1024 on the CPU, 8192 on CUDA")
    parser.add_argument("--traces", type=int, default=2, help="of a step")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of a forward, at most")
    parser.add_argument("--kept", type=int, default=16, help="entries per token")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="on a CPU, a process for each row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory-of", type=float, help=argparse.SUPPRESS)  # it starts itself so
    arguments = parser.parse_args()
    on_cuda = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_cuda else "float32")
    arguments.shape = arguments.shape or ("0.6b" if on_cuda else "small")
    arguments.tokens = arguments.tokens or (8192 if on_cuda else 1024)
    arguments.lead_spans = arguments.lead_spans or ([1.0, 0.5, 0.25] if on_cuda else [1.0, 0.5])
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory_of is not None:
        print(Step(arguments).peak_bytes(arguments.memory_of))
        return
    result = measure(arguments)
    print_table(result)
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
