"""Share of the time that ranks are busy, by batch size, ranks and shards; numbers only, no device.

    python tools/bench_balance.py --json balance.json

Lengths are lognormal, as those of reasoning traces are; time is taken as proportional to tokens.
busy: mean over ranks of a step's tokens, of those of the rank with the most, over all steps.
in_step: the same where ranks wait for each other after every micro-batch, as --sharding full does.
by_shard: busy if each rank trained on the shards that it reads, as rigid loaders do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bench_json import write_figures
from numpy.typing import NDArray

from student_train.batch.packing import plan_micro_batches
from student_train.data.dealing import deal
from student_train.data.order import epoch_order

NUM_TRACES = 8192
MEDIAN_TOKENS = 3000
BATCHES, RANKS, SHARDS = (16, 64, 256), (2, 4, 8, 16), (7, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sigma", type=float, default=0.8, help="spread of the logs of lengths")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = [
        busy_shares(arguments.sigma, arguments.batch_tokens, batch, ranks, shards)
        for batch in BATCHES
        for ranks in RANKS
        for shards in SHARDS
    ]
    print(f"{'traces':>8}{'ranks':>7}{'shards':>8}{'busy':>8}{'in_step':>9}{'by_shard':>10}")
    for row in rows:
        print(
            f"{row['batch_traces']:8}{row['num_ranks']:7}{row['num_shards']:8}"
            f"{row['busy']:8.3f}{row['in_step']:9.3f}{row['by_shard']:10.3f}"
        )
    write_figures(arguments.json, {"sigma": arguments.sigma, "rows": rows})


def busy_shares(
    sigma: float, batch_tokens: int, batch_traces: int, num_ranks: int, num_shards: int
) -> dict[str, Any]:
    """The figures of one row of the table."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_TOKENS), sigma, NUM_TRACES)).astype(np.int64) + 1
    shard = np.arange(NUM_TRACES) * num_shards // NUM_TRACES
    order = epoch_order(shard, np.arange(NUM_TRACES), seed=0, epoch=0, fingerprint="bench")
    num_tokens = lengths[order.row]
    dealing = deal(
        order.shard, num_tokens,
        batch_traces=batch_traces, num_ranks=num_ranks, can_exchange=True,
    )  # fmt: skip
    ends = np.arange(0, NUM_TRACES, batch_traces)
    dealt = [
        _by_rank(num_tokens[first : first + batch_traces], trainer, num_ranks)
        for first, trainer in zip(ends, np.split(dealing.trainer, ends[1:].tolist()), strict=True)
    ]
    read = [
        _by_rank(num_tokens[first : first + batch_traces], reader, num_ranks)
        for first, reader in zip(ends, np.split(dealing.reader, ends[1:].tolist()), strict=True)
    ]
    return {
        "name": f"{batch_traces}/{num_ranks}/{num_shards}".replace("/", "-"),
        "batch_traces": batch_traces,
        "num_ranks": num_ranks,
        "num_shards": num_shards,
        "busy": _busy(dealt),
        "in_step": _busy_in_step(dealt, batch_tokens),
        "by_shard": _busy(read),
    }


def _by_rank(
    num_tokens: NDArray[np.int64], rank: NDArray[np.int64], num_ranks: int
) -> list[list[int]]:
    return [num_tokens[rank == number].tolist() for number in range(num_ranks)]


def _busy(steps: list[list[list[int]]]) -> float:
    loads = np.array([[sum(rank) for rank in ranks] for ranks in steps])
    return float(loads.mean(axis=1).sum() / loads.max(axis=1).sum())


def _busy_in_step(steps: list[list[list[int]]], batch_tokens: int) -> float:
    worked = waited = 0.0
    for ranks in steps:
        plans = [
            [sum(rank[i] for row in rows for i in row) for rows in _plan(rank, batch_tokens)]
            for rank in ranks
        ]
        for number in range(max(map(len, plans))):
            sizes = [plan[number] if number < len(plan) else 1 for plan in plans]
            worked, waited = worked + sum(sizes) / len(sizes), waited + max(sizes)
    return worked / waited


def _plan(lengths: list[int], batch_tokens: int) -> list[list[list[int]]]:
    return plan_micro_batches(lengths, batch_tokens, "flat")


if __name__ == "__main__":
    main()
