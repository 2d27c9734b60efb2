"""Parts of a training step that only a GPU shows: waits, copies, compilation, optimizer, memory.

    python tools/bench_step.py --device cuda --shape 0.6b --json bench_step.json

A Qwen3's shape with random weights learns from random traces, as in bench_train.py. Every figure
has its prediction beside it in gpu_report.py. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_json import write_figures
from bench_train import SHAPES, make_model, random_trace

from student_train.batch.micro_batch import MicroBatch, micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import compile_layers, head_of
from student_train.run.config import TrainConfig
from student_train.run.memory_estimate import estimate

SHORT = 16  # short traces are this much shorter


class Bench:
    """One student, and a micro-batch that fills a forward pass."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.on_cuda = arguments.device == "cuda"
        self.repeats = arguments.repeats
        self.tokens, self.shape, self.kept = arguments.tokens, arguments.shape, arguments.kept
        self.model = make_model(arguments.shape, arguments.tokens, self.device)
        self.student = StudentWithLoss(self.model, head_of(self.model))
        self.student.train()

    def batches(self, num_tokens: int, layout: str = "alone") -> list[MicroBatch]:
        """Micro-batches of `tokens` tokens in traces of that length, as read."""
        vocab = SHAPES[self.shape][-1]
        traces = [
            random_trace(f"t{n}", num_tokens, vocab, self.kept)
            for n in range(self.tokens // num_tokens)
        ]
        return micro_batches(
            TokenSelection().selected(traces), batch_tokens=self.tokens, loss_reduction="token",
            layout=layout,
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def pass_of(self, batch: MicroBatch) -> None:
        """Forward and backward of a micro-batch, as in training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_cuda):
            loss, _ = self.student(batch)
        (loss / batch.num_valid).backward()

    def ms(self, function: Callable[[], object]) -> float:
        """Median time until the device is done; the first call warms up."""
        found = []
        for repeat in range(self.repeats + 1):
            self.wait()
            began_s = time.perf_counter()
            function()
            self.wait()
            if repeat:
                found.append((time.perf_counter() - began_s) * 1e3)
        return statistics.median(found)

    def pass_ms(self, batches: list[MicroBatch]) -> float:
        """Time of forward and backward of all of them."""
        on_device = [batch.to(self.device) for batch in batches]

        def run() -> None:
            for batch in on_device:
                self.pass_of(batch)

        found = self.ms(run)
        self.model.zero_grad()
        return found


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Collect the places at which the CPU waited for the GPU, as far as CUDA's debug mode tells."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def waits(bench: Bench) -> list[str]:
    """Places at which a micro-batch waits; none are known on a CPU."""
    (batch,) = bench.batches(bench.tokens)
    bench.pass_of(batch.to(bench.device))  # compiles the kernels
    if not bench.on_cuda:
        return []
    ready = batch.pinned()
    bench.wait()
    with counted_waits() as found:
        bench.pass_of(ready.to(bench.device))
    return found


def copy_ms(bench: Bench) -> dict[str, float]:
    """Time for which copying a micro-batch holds the CPU up while the device is busy."""
    (batch,) = bench.batches(bench.tokens)
    ways = {"pageable": batch}
    if bench.on_cuda:
        ways["pinned"] = batch.pinned()
    size = 4096 if bench.on_cuda else 64
    square = torch.ones(size, size, device=bench.device)
    found = {}
    for way, each in ways.items():
        times = []
        for _ in range(bench.repeats + 1):
            bench.wait()
            for _ in range(4):
                square @ square  # work that a copy would wait for
            began_s = time.perf_counter()
            each.to(bench.device)
            times.append((time.perf_counter() - began_s) * 1e3)
        found[way] = statistics.median(times[1:])
    return found


def optimizer_ms(bench: Bench) -> dict[str, float]:
    """AdamW's step by implementation; both keep their states, one after the other."""
    (batch,) = bench.batches(bench.tokens)
    bench.pass_of(batch.to(bench.device))
    found = {}
    for way in ("fused", "foreach"):
        is_fused = way == "fused"
        optimizer = torch.optim.AdamW(
            bench.model.parameters(), lr=0.0, fused=is_fused, foreach=not is_fused
        )
        found[way] = bench.ms(optimizer.step)
        del optimizer
    bench.model.zero_grad()
    return found


def memory(bench: Bench) -> dict[str, int]:
    """The estimate of `--estimate`, and the peak of the second of two steps."""
    (batch,) = bench.batches(bench.tokens)
    config = TrainConfig(
        cache=("none",), student="none", out=Path("none"),
        dtype="bfloat16" if bench.on_cuda else "float32",
    )  # fmt: skip
    predicted = estimate(
        bench.model.config, config, num_tokens=bench.tokens, is_cuda=bench.on_cuda
    ).total
    if not bench.on_cuda:
        return {"predicted_bytes": predicted}
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=0.0, fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        bench.pass_of(batch.to(bench.device))
        optimizer.step()
        optimizer.zero_grad()
    return {"predicted_bytes": predicted, "peak_bytes": torch.cuda.max_memory_allocated()}


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All figures; compilation last, which changes the student."""
    bench = Bench(arguments)
    found_waits = waits(bench)
    whole = bench.batches(bench.tokens)
    result: dict[str, object] = {
        "device": arguments.device,
        "shape": arguments.shape,
        "tokens": arguments.tokens,
        "num_parameters": sum(p.numel() for p in bench.model.parameters()),
        "num_waits": len(found_waits),
        "waits": ", ".join(sorted(set(found_waits))),
        "copy_ms": copy_ms(bench),
        "optimizer_ms": optimizer_ms(bench),
        "memory": memory(bench),
        "pass_ms": bench.pass_ms(whole),
        "short_ms": {
            layout: bench.pass_ms(bench.batches(arguments.tokens // SHORT, layout))
            for layout in ("alone", "packed")
        },
    }
    if not arguments.without_compile:
        compile_layers(bench.model)
        result["compiled_pass_ms"] = bench.pass_ms(whole)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--tokens", type=int, default=8192, help="of a forward pass")
    parser.add_argument("--kept", type=int, default=16, help="entries per token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-compile", action="store_true", help="which takes a minute")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    result = measure(arguments)
    for name, value in result.items():
        print(f"{name}: {value}")
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
