"""Bytes that a mixture of lead spans reads where shards are dealt: by shard size and bands.

    python tools/truncation/shard_bytes.py > shard_bytes.csv

Shards of the synthetic reasoning teacher of tools/bench_format.py are encoded at several sizes with
20 and 40 bands, and their blocks counted. A cache of 100 such shards deals 80 of them to 0.375 (or
0.35, or 0.4) and 20 to whole traces, so that an epoch reads four fifths of one prefix and a fifth
of all bytes. `above_mean_span` is that less the mixture's mean span, in points.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_format import ADAPTIVE, TOP_K, Policy, make_header, make_trace  # of tools/
from bench_format_teachers import REASONING, traces

from teacher_cache.format import Trace, keep_entries, lead_span_length
from teacher_cache.format.bands import num_bands_needed
from teacher_cache.format.writing.shard import encode_shard

SIZES_MIB = (1, 4, 12, 32)
BYTES_PER_TOKEN = 36  # about; the size that was reached is printed
WHOLE_SHARE = 0.2


def main() -> None:
    num_tokens = [(size << 20) // BYTES_PER_TOKEN for size in SIZES_MIB]
    held = list(_traces(num_tokens[-1]))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = ["shard_mib", "bands", "bytes_per_token", "read_at_0.5", "short_span"]
    writer.writerow([*names, "read_at_short_span", "mixture_reads", "above_mean_span"])
    for wanted in num_tokens:
        some = list(_first(held, wanted))
        for num_bands in (20, 40):
            shard = encode_shard(some, make_header(Policy("", ADAPTIVE, num_bands)))
            ends = [block.offset + block.length for block in shard.blocks]
            lengths = [trace.n_total for trace in some]

            def share(span: float, ends: list[int] = ends, lengths: list[int] = lengths) -> float:
                spans = ((n, lead_span_length(n, span)) for n in lengths)
                return ends[num_bands_needed(spans, len(ends)) - 1] / ends[-1]

            for short in (0.35, 0.375, 0.4):
                reads = (1 - WHOLE_SHARE) * share(short) + WHOLE_SHARE
                mean = (1 - WHOLE_SHARE) * short + WHOLE_SHARE
                figures = [len(shard.data) / (1 << 20), num_bands, len(shard.data) / sum(lengths)]
                row = [f"{figures[0]:.1f}", num_bands, f"{figures[2]:.1f}", f"{share(0.5):.4f}"]
                above = f"{100 * (reads - mean):+.1f}"
                writer.writerow([*row, short, f"{share(short):.4f}", f"{reads:.4f}", above])
                sys.stdout.flush()


def _traces(num_tokens: int) -> Iterator[Trace]:
    for number, row in enumerate(traces(REASONING, num_tokens, TOP_K, 0)):
        kept = keep_entries(row.ids, row.logprobs, ADAPTIVE)
        yield make_trace(f"t{number:05d}", row, kept)


def _first(held: list[Trace], num_tokens: int) -> Iterator[Trace]:
    """Traces until they hold this many tokens."""
    done = 0
    for trace in held:
        if done >= num_tokens:
            return
        yield trace
        done += trace.n_total


if __name__ == "__main__":
    main()
