"""Transfer of the teacher's rows: padded on the CPU, or moved ragged and padded on the device.

    python tools/bench_to_device.py --device cuda --json bench_to_device.json

`dense` is the way of training: [N, K] filled by numpy, int64 beside float32, then copied. `ragged`
joins the flat entries of the traces in pinned memory, copies them as they are stored in RAM, and
scatters them to their places on the device. Both start from the same traces and end with the same
tensors, which is checked. `busy` is the time that occupies the CPU, `done` that until the device
has them; medians of micro-batches of all rounds, the two ways in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from bench_format import make_trace
from bench_format_teachers import REASONING
from bench_format_teachers import traces as synthetic_traces
from bench_json import write_figures

from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from student_train.losses import TeacherTargets
from teacher_cache.format import KeepPolicy, Trace, keep_entries

POLICY = KeepPolicy(top_k=64, mass=0.999)


def dense(traces: Sequence[Trace], device: torch.device) -> TeacherTargets:
    # In one row: only the teacher's rows matter here, whatever the student does with them.
    (batch,) = micro_batches(
        TokenSelection().selected(traces),
        batch_tokens=sum(len(trace.k) for trace in traces),
        loss_reduction="token",
        layout="flat",
    )
    return batch.to(device).targets


def joined(parts: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Join arrays on the device, through memory that the device can read by itself."""
    pinned = torch.empty(
        sum(map(len, parts)),
        dtype=torch.from_numpy(parts[0][:0]).dtype,
        pin_memory=device.type == "cuda",
    )
    np.concatenate(parts, out=pinned.numpy())
    return pinned.to(device, non_blocking=True)


def ragged(traces: Sequence[Trace], device: torch.device) -> TeacherTargets:
    valid = [trace.k > 0 for trace in traces]
    k_parts = [trace.k[rows] for trace, rows in zip(traces, valid, strict=True)]
    widest = max(int(part.max()) for part in k_parts)  # known here: no waiting for the device
    num_entries = sum(trace.num_entries for trace in traces)
    k_N = joined(k_parts, device).long()
    shift_N = torch.arange(len(k_N), device=device) * widest - (k_N.cumsum(0) - k_N)
    places_E = torch.repeat_interleave(shift_N, k_N, output_size=num_entries)
    places_E += torch.arange(num_entries, device=device)

    def padded(parts: list[np.ndarray]) -> torch.Tensor:
        flat_E = joined(parts, device)
        out = flat_E.new_zeros(len(k_N) * widest)
        return out.scatter_(0, places_E, flat_E).view(len(k_N), widest)

    def rows_of(name: str) -> list[np.ndarray]:
        return [getattr(trace, name)[rows] for trace, rows in zip(traces, valid, strict=True)]

    return TeacherTargets(
        top_ids=padded([trace.top_ids for trace in traces]),
        top_logits=padded([trace.top_logits for trace in traces]),
        k=k_N,
        tail_logit=joined(rows_of("tail_logit"), device),
        target_ids=joined(rows_of("token_ids"), device),
    )


def timed(
    way: Callable[[Sequence[Trace], torch.device], TeacherTargets],
    traces: Sequence[Trace],
    device: torch.device,
) -> tuple[float, float]:
    """Seconds until the CPU is free, and until the device is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began_s = time.perf_counter()
    targets = way(traces, device)
    busy_s = time.perf_counter() - began_s
    wait()
    done_s = time.perf_counter() - began_s
    del targets
    return busy_s, done_s


def make_groups(num_tokens: int, num_groups: int) -> list[list[Trace]]:
    """Micro-batches of traces of about this many tokens, the longest first."""
    source = synthetic_traces(REASONING, num_tokens * num_groups, POLICY.top_k, seed=0)
    groups: list[list[Trace]] = [[]]
    for number, rows in enumerate(source):
        trace = make_trace(f"t{number:05d}", rows, keep_entries(rows.ids, rows.logprobs, POLICY))
        if sum(len(each.k) for each in groups[-1]) >= num_tokens:
            groups.append([])
        groups[-1].append(trace)
    return [sorted(group, key=lambda trace: -len(trace.k)) for group in groups]


def check_equal(group: Sequence[Trace], device: torch.device) -> None:
    one, other = dense(group, device), ragged(group, device)
    for item in fields(TeacherTargets):
        first, second = getattr(one, item.name), getattr(other, item.name)
        if not torch.equal(first, second.to(first.dtype)):
            raise SystemExit(f"{item.name} differs between the two ways")


def num_bytes(group: Sequence[Trace], device: torch.device) -> tuple[int, int]:
    """Bytes that cross to the device: dense, ragged."""
    targets = dense(group, device)
    tensors = [getattr(targets, item.name) for item in fields(TeacherTargets)]
    num_rows = len(targets)
    entries = sum(trace.num_entries for trace in group)
    return sum(each.numel() * each.element_size() for each in tensors), entries * 8 + num_rows * 9


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device(arguments.device)
    groups = make_groups(arguments.tokens, arguments.groups)
    check_equal(groups[0], device)
    ways = {"dense": dense, "ragged": ragged}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for group in groups:
            size = sum(len(trace.k) for trace in group)
            for name, way in ways.items():
                busy_s, done_s = timed(way, group, device)
                times[name].append((busy_s / size, done_s / size))
    moved = [sum(column) for column in zip(*(num_bytes(g, device) for g in groups), strict=True)]
    num_tokens = sum(len(trace.k) for group in groups for trace in group)
    rows = {
        name: {
            "busy_us_per_token": statistics.median(busy for busy, _ in found) * 1e6,
            "tokens_per_s": 1 / statistics.median(done for _, done in found),
            "bytes_per_token": moved[index] / num_tokens,
        }
        for index, (name, found) in enumerate(times.items())
    }
    return {
        "device": arguments.device,
        "tokens": arguments.tokens,
        "groups": len(groups),
        "ways": rows,
        "ragged_over_dense": rows["ragged"]["tokens_per_s"] / rows["dense"]["tokens_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a micro-batch, about")
    parser.add_argument("--groups", type=int, default=8, help="different micro-batches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(f"{'':8}{'tokens/s':>14}{'CPU us/token':>14}{'bytes/token':>13}")
    for name, row in result["ways"].items():
        print(
            f"{name:8}{row['tokens_per_s']:>14,.0f}{row['busy_us_per_token']:>14.3f}"
            f"{row['bytes_per_token']:>13.1f}"
        )
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
