"""The cache format against its rivals: bytes, fidelity, speed, and the reads of a lead span.

    python tools/bench_format.py                        # synthetic teachers, see *_teachers.py
    python tools/bench_format.py --cache DIR --json bench_format.json

Times are processor seconds of one thread, the best of `--repeats`. `encode` is from an engine's
rows (65 candidates) to the bytes of shards, `ragged` from files to `Trace` objects, all checks on,
`dense` from there to torch tensors [N, K] of one micro-batch at a time, as the student makes them.
KL is from the teacher's distribution to the stored one, over the kept entries and one bucket for
the rest, nats per token, of the first 100,000 tokens; a rival without a tail is given 1 - sum, at
least 1e-7. Shares of bytes are counted by the operating system; by default the tokens fill one
shard, since a small one has as large a dictionary.

Adopted for speed, in processor time per token on a busy core: logit codes by look-up instead of
binary search (the largest part of encoding before); dictionaries decoded by Arrow instead of numpy
indexing; exponentials only of the candidates that can be kept; micro-batches filled by scattering
entries to their places instead of through a mask, ids int32 (half the time from traces to [N, K]).
Not worth it: rows in chunks of 512 to 1,024 (1.2 instead of 1.25 us in `keep`; slower below 256);
the check that each token is among its entries in chunks of 16,384 or 65,536 entries, or its hits
found by Arrow. Of the 180 ms to read 613,000 tokens, zstd takes 62, the ids' 32-bit indices 43.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_format_rivals import BUDGET, RECOMMENDED, Stored, plain_arrow
from bench_format_teachers import TEACHERS, VOCAB_SIZE, Rows, traces
from bench_json import write_figures
from numpy.typing import NDArray

from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from teacher_cache.format import (
    Cache,
    CacheHeader,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    KeptEntries,
    Trace,
    keep_entries,
    lead_span_length,
    open_cache,
    seal_cache,
    stored_logprobs,
    tail_mass,
)
from teacher_cache.format.writing.shard import encode_shard

LEAD_SPANS = (0.1, 0.25, 0.5, 0.75)
RIVAL_CANDIDATES = 128  # the widest rival's
TOP_K = 64
NUM_COMPARED = 100_000  # tokens whose KL is measured, and that rivals store
BATCH_TOKENS = 16_384
READ_ALL = """
import sys
from pathlib import Path
from teacher_cache.format import open_cache
cache = open_cache(sys.argv[1])
for index, shard in enumerate(cache.shards):
    cache.read(index, {row: info.n_total for row, info in enumerate(shard.traces)})
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Policy:
    """One of our own configurations."""

    name: str
    keep: KeepPolicy
    num_bands: int = 20


ADAPTIVE = KeepPolicy(TOP_K, 0.999)
FIXED = Policy("leadspan, k=64", KeepPolicy(TOP_K, 2.0))
POLICIES = {
    "reasoning": (Policy("leadspan, mass 0.999", ADAPTIVE), FIXED),
    "text": (Policy("leadspan, mass 0.999", ADAPTIVE), FIXED),
    "short": tuple(Policy(f"leadspan, {n} bands", ADAPTIVE, n) for n in (1, 5, 10, 20)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", choices=sorted(TEACHERS), action="append")
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", help="measure a sealed cache too")
    parser.add_argument("--no-synthetic", action="store_true", help="only what --cache names")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "versions": {"numpy": np.__version__, "pyarrow": pa.__version__},
    }
    for name in [] if arguments.no_synthetic else arguments.teacher or list(TEACHERS):
        found[name] = synthetic(name, arguments.tokens, arguments.seed, arguments.repeats)
    if arguments.cache:
        cache = open_cache(arguments.cache)
        figures = {"cache": arguments.cache, **measure_reading(cache, arguments.repeats)}
        print(f"\n{arguments.cache}: {figures['num_tokens']:,} tokens")
        print_table([figures])
        found["cache"] = figures
    write_figures(arguments.json, found)


def synthetic(name: str, num_tokens: int, seed: int, repeats: int) -> dict[str, Any]:
    """Every policy and rival on one synthetic teacher."""
    rows = list(traces(TEACHERS[name], num_tokens, TOP_K, seed))
    about = describe(rows)
    print(f"\n{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in about.items()))
    results = []
    for policy in POLICIES[name]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure_ours(policy, rows, Path(folder) / "cache", repeats))
    if name != "short":
        few = min(num_tokens, NUM_COMPARED)
        results += measure_rivals(list(traces(TEACHERS[name], few, RIVAL_CANDIDATES, seed)))
    print_table(results)
    return {"teacher": about, "results": results}


def describe(rows: Sequence[Rows]) -> dict[str, float]:
    """Properties of the teacher, by which its figures can be judged."""
    entropy = np.concatenate([trace.entropy for trace in rows])
    probs = np.exp(np.concatenate([trace.logprobs[:, 1 : TOP_K + 1] for trace in rows]))
    return {
        "traces": len(rows),
        "tokens": sum(len(trace.token_ids) for trace in rows),
        "entropy mean": entropy.mean(),
        "median": np.quantile(entropy, 0.5),
        "80th percentile": np.quantile(entropy, 0.8),
        "95th": np.quantile(entropy, 0.95),
        "share below 0.01 nat": (entropy < 0.01).mean(),
        "mass of the top 64": probs.sum(axis=1).mean(),
        "vocabulary": VOCAB_SIZE,
    }


def measure_ours(
    policy: Policy, rows: Sequence[Rows], folder: Path, repeats: int
) -> dict[str, Any]:
    """Write a cache, read it back."""
    header = make_header(policy)
    keep_s = best_s(
        lambda: [keep_entries(row.ids, row.logprobs, policy.keep) for row in rows], repeats
    )
    kept = [keep_entries(row.ids, row.logprobs, policy.keep) for row in rows]
    finished = [
        FinishedTrace(make_trace(f"t{number:05d}", row, entries), "synthetic")
        for number, (row, entries) in enumerate(zip(rows, kept, strict=True))
    ]
    whole = [item.trace for item in finished]
    encode_s = best_s(lambda: encode_shard(whole, header), repeats)
    start = time.process_time()
    with CacheWriter(folder, header) as writer:
        for item in finished:
            writer.append(item)
        writer.finish()
    write_s = time.process_time() - start
    seal_cache(folder)
    num_tokens = sum(len(row.token_ids) for row in rows)
    fidelity = compare(rows, kept)
    reading = measure_reading(open_cache(str(folder)), repeats)
    return {
        **reading,
        "name": policy.name,
        **fidelity,
        "encode_tokens_per_s": num_tokens / (keep_s + encode_s),
        "keep_s": keep_s,
        "encode_shard_s": encode_s,
        "journal_and_publish_s": write_s - encode_s,
    }


def measure_reading(cache: Cache, repeats: int) -> dict[str, Any]:
    """Bytes and speed of a cache."""
    num_tokens = sum(shard.num_tokens for shard in cache.shards)
    num_bytes = sum(shard.size_bytes for shard in cache.shards)
    ragged_s = best_s(lambda: read(cache, 1.0), repeats)
    held = read(cache, 1.0)
    mean_k = sum(trace.num_entries for trace in held) / num_tokens
    dense_s = best_s(lambda: to_dense(held), repeats)
    return {
        "name": cache.header.teacher,
        "num_tokens": num_tokens,
        "mean_k": mean_k,
        "bytes_per_token": num_bytes / num_tokens,
        "column_bytes_per_token": {
            name: size / num_tokens for name, size in column_bytes(cache).items()
        },
        "decode_ragged_tokens_per_s": num_tokens / ragged_s,
        "decode_dense_tokens_per_s": num_tokens / (ragged_s + dense_s),
        **{f"bytes_fraction_at_{x}": bytes_fraction(cache, x, num_bytes) for x in LEAD_SPANS},
        "peak_rss_bytes": peak_rss_bytes(cache.path),
    }


def read(cache: Cache, lead_span: float) -> list[Trace]:
    found: list[Trace] = []
    for index, shard in enumerate(cache.shards):
        keep = {row: lead_span_length(t.n_total, lead_span) for row, t in enumerate(shard.traces)}
        found += cache.read(index, keep).values()
    return found


def to_dense(held: Sequence[Trace]) -> None:
    selection = TokenSelection()
    for first in range(0, len(held), 8):
        micro_batches(
            selection.selected(held[first : first + 8]),
            batch_tokens=BATCH_TOKENS,
            loss_reduction="token",
        )


def bytes_fraction(cache: Cache, lead_span: float, num_bytes: int) -> float:
    """Share of the shards' bytes that the process asks the operating system for."""
    before = bytes_asked_for()
    read(cache, lead_span)
    return (bytes_asked_for() - before) / num_bytes


def bytes_asked_for() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.partition("rchar: ")[2].split()[0])


def column_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of each column's compressed buffers; `rest` is dictionaries and framing."""
    sizes: dict[str, int] = {}
    codec = pa.Codec("zstd", compression_level=1)
    for shard in cache.shards:
        file = f"{cache.store.root}/shards/{shard.name}.arrow"
        with pa.ipc.open_file(cache.store.filesystem.open_input_file(file)) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for name in batch.schema.names:
                    size = sum(codec.compress(b).size for b in plain(batch[name]).buffers() if b)
                    sizes[name] = sizes.get(name, 0) + size
    sizes["rest"] = sum(shard.size_bytes for shard in cache.shards) - sum(sizes.values())
    return sizes


def plain(column: pa.Array) -> pa.Array:
    """A column with its dictionaries' indices instead of their values."""
    if isinstance(column, pa.ListArray):
        return pa.ListArray.from_arrays(column.offsets, plain(column.values))
    return column.indices if isinstance(column, pa.DictionaryArray) else column


def peak_rss_bytes(path: str) -> int:
    """Peak of a fresh process that reads shard by shard, Python and pyarrow included."""
    run = subprocess.run(
        [sys.executable, "-c", READ_ALL, path], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(run.stdout)


def measure_rivals(rows: Sequence[Rows]) -> list[dict[str, Any]]:
    ids = np.concatenate([row.ids[:, 1:] for row in rows])
    logprobs = np.concatenate([row.logprobs[:, 1:] for row in rows])
    found = []
    stored = plain_arrow(ids, logprobs, TOP_K)
    found.append(rival("Arrow int32 + fp16, k=64", stored, logprobs))
    for setting in (RECOMMENDED, BUDGET):
        part = slice(0, 50_000)  # its packing is slow, and every token costs the same
        stored = setting.store(ids[part], logprobs[part], VOCAB_SIZE)
        found.append(rival(setting.name, stored, logprobs[part]))
    return found


def rival(name: str, stored: Stored, logprobs: NDArray[np.float32]) -> dict[str, Any]:
    if not stored.ids_equal:
        raise ValueError(f"{name}: ids do not survive the round trip")
    num_tokens, k = stored.logprobs.shape
    true = np.exp(logprobs[:, :k].astype(np.float64))
    with np.errstate(over="ignore"):
        found = np.exp(stored.logprobs.astype(np.float64))
    tail = np.maximum(1 - found.sum(axis=1), 1e-7)
    norm = found.sum(axis=1) + tail
    kl = divergence(true, 1 - true.sum(axis=1), found / norm[:, None], tail / norm)
    return {
        "name": name,
        "mean_k": float(k),
        "bytes_per_token": stored.num_bytes / num_tokens,
        "kl_mean": kl.mean(),
        "kl_p99": np.quantile(kl, 0.99),
        "max_logprob_error": np.abs(stored.logprobs - logprobs[:, :k]).max(),
        "decode_dense_tokens_per_s": num_tokens / stored.decode_s,
        "encode_tokens_per_s": num_tokens / stored.encode_s,
    }


def divergence(
    true: NDArray[np.float64],
    true_tail: NDArray[np.float64],
    found: NDArray[np.float64],
    found_tail: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[R] KL(true || found) over entries and tail, 0 log 0 = 0."""
    p = np.concatenate([true, np.maximum(true_tail, 1e-7)[:, None]], axis=1)
    p = p / p.sum(axis=1, keepdims=True)
    q = np.concatenate([found, found_tail[:, None]], axis=1)
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0.0)
    kl: NDArray[np.float64] = terms.sum(axis=1)
    return kl


def compare(rows: Sequence[Rows], kept: Sequence[KeptEntries]) -> dict[str, float]:
    """The stored entries against the teacher's, entry by entry."""
    divergences, errors, num_compared = [], [], 0
    for row, entries in zip(rows, kept, strict=True):
        if num_compared >= NUM_COMPARED:
            break
        num_compared += len(row.ids)
        stored = stored_logprobs(entries.k, entries.top_logits, entries.tail_logit)
        inside = np.arange(int(entries.k.max())) < entries.k[:, None]
        ids = np.full(inside.shape, -1, np.int64)
        ids[inside] = entries.top_ids
        found = np.zeros(inside.shape)
        found[inside] = np.exp(stored)
        true = np.zeros(inside.shape)
        for number in range(ids.shape[1]):
            same = row.ids == ids[:, number, None]
            place = same.argmax(axis=1)
            logprob = np.take_along_axis(row.logprobs, place[:, None], axis=1)[:, 0]
            true[:, number] = np.where(inside[:, number], np.exp(logprob, dtype=np.float64), 0.0)
        tail = tail_mass(entries.tail_logit)
        divergences.append(divergence(true, 1 - true.sum(axis=1), found, tail))
        errors.append(np.abs(stored - np.log(true[inside])).max())
    kl = np.concatenate(divergences)
    return {
        "kl_mean": kl.mean(),
        "kl_p99": np.quantile(kl, 0.99),
        "max_logprob_error": max(errors),
    }


def make_trace(trace_id: str, rows: Rows, kept: KeptEntries) -> Trace:
    n_total = len(rows.token_ids)
    return Trace(
        trace_id=trace_id,
        token_ids=rows.token_ids,
        n_total=n_total,
        cot_start=1,
        answer_start=n_total * 9 // 10,
        k=np.concatenate([[0], kept.k]).astype(np.uint8),
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=np.concatenate([[0.0], kept.tail_logit]).astype(np.float32),
    )


def make_header(policy: Policy) -> CacheHeader:
    return CacheHeader(
        mode="score", teacher="synthetic", teacher_revision=None, teacher_fingerprint="",
        engine="none", engine_version="", dtype="float32", head_dtype="float32",
        vocab_size=VOCAB_SIZE, tokenizer_size=VOCAB_SIZE, tokenizer_fingerprint="",
        chat_template_hash="", think_open_ids=(), think_close_ids=(), terminal_token_ids=(),
        sampling=None, top_k=policy.keep.top_k, mass=policy.keep.mass, capture_prompt=True,
        num_bands=policy.num_bands,
    )  # fmt: skip


def best_s(work: Callable[[], object], repeats: int) -> float:
    """Least processor seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def print_table(results: Sequence[dict[str, Any]]) -> None:
    columns = {
        "B/token": ("bytes_per_token", "{:.1f}"),
        "mean k": ("mean_k", "{:.1f}"),
        "KL mean": ("kl_mean", "{:.1e}"),
        "KL p99": ("kl_p99", "{:.1e}"),
        "max err": ("max_logprob_error", "{:.2f}"),
        "ragged Mtok/s": ("decode_ragged_tokens_per_s", "{:.2f}"),
        "dense Mtok/s": ("decode_dense_tokens_per_s", "{:.2f}"),
        "encode Mtok/s": ("encode_tokens_per_s", "{:.2f}"),
    }
    print(f"{'':26}" + "".join(f"{title:>14}" for title in columns))
    for result in results:
        line = f"{result['name']:26}"
        for key, form in columns.values():
            value = result.get(key)
            shown = value / 1e6 if value is not None and key.endswith("per_s") else value
            line += f"{'' if shown is None else form.format(shown):>14}"
        print(line)
    for result in results:
        if "column_bytes_per_token" in result:
            shares = ", ".join(f"{x}: {result[f'bytes_fraction_at_{x}']:.4f}" for x in LEAD_SPANS)
            parts = ", ".join(
                f"{name} {size:.2f}" for name, size in result["column_bytes_per_token"].items()
                if size >= 0.005
            )  # fmt: skip
            print(f"  {result['name']}: share of bytes read at {shares}")
            print(f"    B/token by column: {parts}; peak {result['peak_rss_bytes'] / 1e6:.0f} MB")
            if "keep_s" in result:
                print(
                    f"    encode: keep {result['keep_s']:.3f} s, "
                    f"shard {result['encode_shard_s']:.3f} s, "
                    f"journal and publication {result['journal_and_publish_s']:.3f} s"
                )


if __name__ == "__main__":
    main()
