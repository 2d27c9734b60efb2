"""Memory of the stream of several ranks on one machine, against the bound that the guide states.

    python tools/bench_stream_memory.py --ranks 8 --tokens 65536 --json bench_stream_memory.json

Every rank is a process that streams its part of one epoch of long traces, without a student, and
takes a step each 0.2 s, so that prepared steps pile up. `grew` is the peak of its memory over what
it held when the stream began (imports, catalogue, process group). `bound` is what the guide adds
up: traces that wait in memory (`--memory-mb`), the shard being read, packed and unpacked, the
prepared steps (four, one in the thread's hands, one in the trainer's), and a step on its way
between ranks, as it is sent and as it arrives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from bench_format import ADAPTIVE, Policy, make_header, make_trace
from bench_format_teachers import TEACHERS, VOCAB_SIZE, traces
from bench_json import write_figures

from student_train.batch.gloo_exchange import GlooExchange
from student_train.data.exchange import packed_bytes
from student_train.data.stream import PREFETCH_STEPS, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.format import CacheWriter, FinishedTrace, Trace, keep_entries, seal_cache

STEP_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=65_536, help="of every trace")
    parser.add_argument("--traces", type=int, default=128)
    parser.add_argument("--batch-traces", type=int, default=32)
    parser.add_argument("--lead-span", type=float, default=1.0)
    parser.add_argument("--memory-mb", type=int, default=64, help="of waiting traces, per rank")
    parser.add_argument("--folder", type=Path, help="keep the cache here, and use it again")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.folder or Path(temporary)) / "cache"
        if not (cache / "cache.json").exists():
            write_cache(cache, arguments.traces, arguments.tokens)
        meeting = f"file://{temporary}/meeting"
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(arguments.ranks) as pool:
            work = [(rank, cache, meeting, arguments) for rank in range(arguments.ranks)]
            found = pool.starmap(of_rank, work, chunksize=1)
    for row in found:
        print(", ".join(f"{name} {value:,.0f}" for name, value in row.items()))
    write_figures(arguments.json, {f"rank {n}": row for n, row in enumerate(found)})


def write_cache(folder: Path, num_traces: int, num_tokens: int) -> None:
    """Write traces of one length: the same rows, of other tokens each time."""
    rng = np.random.default_rng(0)
    policy = Policy("", ADAPTIVE)
    rows = list(traces(TEACHERS["reasoning"], num_tokens, ADAPTIVE.top_k, seed=0))
    parts = [make_trace("", row, keep_entries(row.ids, row.logprobs, policy.keep)) for row in rows]
    long = joined(parts, num_tokens)
    with CacheWriter(folder, make_header(policy)) as writer:
        for number in range(num_traces):
            other = rng.permutation(VOCAB_SIZE).astype(np.int32)
            ids = {"token_ids": other[long.token_ids], "top_ids": other[long.top_ids]}
            trace = replace(long, trace_id=f"t{number}", **ids)
            writer.append(FinishedTrace(trace, "synthetic"))
        writer.finish()
    seal_cache(folder)


def joined(parts: list[Trace], num_tokens: int) -> Trace:
    """One trace of the tokens of several."""
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("token_ids", "k", "tail_logit", "top_ids", "top_logits")
    }
    whole = replace(parts[0], n_total=len(columns["k"]), **columns)[:num_tokens]
    return replace(whole, n_total=num_tokens, answer_start=num_tokens * 9 // 10)


def of_rank(rank: int, cache: Path, meeting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One rank's epoch; bytes in MB."""
    num_ranks, memory_bytes = arguments.ranks, arguments.memory_mb << 20
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    data = open_data([str(cache)])
    stream = TraceStream(
        data, TokenSelection(lead_span=arguments.lead_span), batch_traces=arguments.batch_traces,
        num_epochs=1, rank=rank, num_ranks=num_ranks, exchange=GlooExchange(),
        memory_bytes=memory_bytes,
    )  # fmt: skip
    before = memory_of("VmRSS")
    step_bytes = trace_bytes = 0
    with stream:
        for step in stream:
            sizes = [packed_bytes(each.trace) for each in step.traces]
            step_bytes = max(step_bytes, sum(sizes))
            trace_bytes = max(trace_bytes, *sizes, 0)
            time.sleep(STEP_S)
    grew = memory_of("VmHWM") - before
    dist.destroy_process_group()
    largest = max(data.sources[0].cache.shards, key=lambda shard: shard.size_bytes)
    unpacked = len(largest.traces) * trace_bytes
    steps = (PREFETCH_STEPS + 2 + 2) * step_bytes
    bound = memory_bytes + largest.size_bytes + unpacked + steps
    parts = {
        "grew": grew, "bound": bound, "waiting": memory_bytes, "packed shard": largest.size_bytes,
        "unpacked shard": unpacked, "step": step_bytes, "before": before,
    }  # fmt: skip
    return {name: value / 1e6 for name, value in parts.items()}


def memory_of(name: str) -> int:
    """A figure of this process' memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
