"""The stream against other readers of such data: useful tokens per second at lead span 0.5.

    python tools/bench_stream.py --mosaic-python OTHER/bin/python --json bench_stream.json

All must deliver the same: for every trace of one epoch, the first half of its tokens, with their
ids, numbers of entries, entries and tails as numpy arrays; the checksums of the delivered data
must agree. Ours shuffles and checks every byte; the others read in order.

- ours: `TraceStream`, batches of 16 traces.
- datasets: `load_dataset("arrow", streaming=True)` over the same shards, as numpy rows, or as
  Arrow tables with the rows of a trace put together by hand, as a skilled user would.
- MosaicML streaming: one sample per trace, an ndarray per column, written as MDS with zstd, and
  without compression (four times the disk). It wants other versions of torch and transformers
  than ours, so it runs in an environment of its own that holds `mosaicml-streaming`; without one it
  is left out. Its first epoch is measured, as of everyone.

Every measurement is a fresh process; figures are medians of `--repeats` rounds, taken in turns.
`tokens_per_s` is per second of processor time, all threads together: what one core does.
`wait_share` is how much of its time a consumer waits that takes `--train-tokens-per-s`, after its
first step, which waits until ten shards are there.
`shuffle_quality` is the mean distance in the epoch of traces that are neighbours in a shard, as a
proportion of that in a full permutation, and `most_waiting` the largest share of the epoch that has
been read and waits for its turn; of MosaicML's `py1e` likewise, from its own function, with the
block that it takes by default (all of an epoch of that size) and one that keeps as much waiting.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_format import ADAPTIVE, Policy, bytes_asked_for, make_header, make_trace
from bench_format_teachers import TEACHERS, traces
from bench_json import write_figures
from bench_stream_mosaic import COLUMNS, Delivered
from numpy.typing import NDArray

from student_train.data.due import most_waiting
from student_train.data.order import EpochOrder, data_order, epoch_order
from student_train.data.stream import TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.format import (
    CacheWriter,
    FinishedTrace,
    Trace,
    keep_entries,
    lead_span_length,
    open_cache,
    seal_cache,
)
from teacher_cache.format.writing.writer import SHARD_BYTES

LEAD_SPAN = 0.5
BATCH_TRACES = 16
OURS, ROWS, TABLES = "leadspan", "datasets, numpy rows", "datasets, tables by hand"
MOSAIC = {"MosaicML, zstd": "zstd:1", "MosaicML, uncompressed": ""}
SHARDS_OF_QUALITY, TRACES_PER_SHARD = (20, 100, 1000), 100
PY1E_BLOCKS = (4_000_000, 65_000)  # the default on one machine; much the same waits as with ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400_000, help="distinct ones")
    parser.add_argument("--copies", type=int, default=24, help="of every trace, under other ids")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train-tokens-per-s", type=float, default=200_000)
    parser.add_argument("--mosaic-python", help="an interpreter that has mosaicml-streaming")
    parser.add_argument("--folder", type=Path, help="keep the data here, and use it again")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", choices=[OURS, ROWS, TABLES, "wait"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder, arguments.train_tokens_per_s)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_all(folder, arguments)
        found = measure(folder, arguments)
    show(found)
    write_figures(arguments.json, found)


# --- the data ----------------------------------------------------------------------------------


def write_all(folder: Path, arguments: argparse.Namespace) -> None:
    """Create the cache and the same traces as MDS, where they are missing."""
    cache = folder / "cache"
    if not (cache / "cache.json").exists():
        policy = Policy("", ADAPTIVE)
        rows = list(traces(TEACHERS["reasoning"], arguments.tokens, ADAPTIVE.top_k, seed=0))
        whole = [
            make_trace(f"t{n}", row, keep_entries(row.ids, row.logprobs, policy.keep))
            for n, row in enumerate(rows)
        ]
        shard_bytes = arguments.shard_bytes
        with CacheWriter(cache, make_header(policy), shard_bytes=shard_bytes) as writer:
            for copy in range(arguments.copies):
                for trace in whole:
                    named = replace(trace, trace_id=f"{trace.trace_id}-{copy}")
                    writer.append(FinishedTrace(named, "synthetic"))
            writer.finish()
        seal_cache(cache)
    if arguments.mosaic_python:
        table = folder / "traces.arrow"
        if not table.exists():
            write_table(cache, table)
        for name, compression in MOSAIC.items():
            if not (folder / name).exists():
                mosaic(arguments.mosaic_python, "write", table, folder / name, compression)


def write_table(cache_folder: Path, file: Path) -> None:
    """Whole traces, a row each, for the writer of MDS."""
    cache = open_cache(cache_folder)
    with pa.OSFile(str(file), "wb") as sink:
        writer = None
        for index, shard in enumerate(cache.shards):
            found = cache.read(index, {row: t.n_total for row, t in enumerate(shard.traces)})
            columns = {
                name: pa.array([getattr(trace, name) for trace in found.values()])
                for name in COLUMNS
            }
            batch = pa.RecordBatch.from_pydict(columns)
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        if writer:
            writer.close()


# --- the readers, each in a process of its own -------------------------------------------------


def child(name: str, folder: Path, train_tokens_per_s: float) -> dict[str, float]:
    if name == "wait":
        return waiting(folder / "cache", train_tokens_per_s)
    readers = {OURS: read_ours, ROWS: read_rows, TABLES: read_tables}
    if name == OURS:  # loading modules is not measured
        open_cache(folder / "cache").read(0, {0: 1})
    else:
        importlib.import_module("datasets")
    delivered = Delivered()
    before, start_s, start_cpu_s = bytes_asked_for(), time.perf_counter(), time.process_time()
    for arrays in readers[name](folder / "cache"):
        delivered.add(arrays)
    return {
        "wall_s": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "num_bytes": bytes_asked_for() - before,
        **delivered.figures(),
    }


def read_ours(cache: Path) -> Iterator[dict[str, NDArray[Any]]]:
    for step in stream_of(cache):
        for item in step.traces:
            yield arrays_of(item.trace)


def stream_of(cache: Path) -> Iterator[Any]:
    data, selection = open_data([cache]), TokenSelection(LEAD_SPAN)
    with TraceStream(data, selection, batch_traces=BATCH_TRACES, num_epochs=1) as stream:
        yield from stream


def arrays_of(trace: Trace) -> dict[str, NDArray[Any]]:
    return {name: getattr(trace, name) for name in COLUMNS}


def read_rows(cache: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """Rows as numpy; a trace is whole when its last row has come."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in dataset_of(cache).with_format("numpy"):
        keep = lead_span_length(int(row["n_total"]), LEAD_SPAN)
        if row["start"] >= keep:
            continue
        of_trace = parts.setdefault(str(row["trace_id"]), [])
        of_trace.append(row)
        if row["start"] + len(row["token_ids"]) >= keep:
            yield joined(of_trace, keep)
            del parts[str(row["trace_id"])]


def read_tables(cache: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """A band of a shard at a time as Arrow, its columns flat numpy, cut by row."""
    parts: dict[str, list[dict[str, Any]]] = {}
    # A batch at a time as it is in the file: with another size, datasets would copy.
    for _, table in dataset_of(cache).with_format("arrow")._ex_iterable.iter_arrow():
        ids, starts = table["trace_id"].to_pylist(), table["start"].to_numpy()
        n_total = table["n_total"].to_numpy()
        columns = {name: flat(table[name]) for name in COLUMNS}
        for row, trace_id in enumerate(ids):
            keep = lead_span_length(int(n_total[row]), LEAD_SPAN)
            if starts[row] >= keep:
                continue
            of_row = {name: values[e[row] : e[row + 1]] for name, (values, e) in columns.items()}
            parts.setdefault(trace_id, []).append(of_row)
            if starts[row] + len(of_row["token_ids"]) >= keep:
                yield joined(parts.pop(trace_id), keep)


def dataset_of(cache: Path) -> Any:  # noqa: ANN401  # datasets has no types
    from datasets import load_dataset

    files = sorted(str(file) for file in (cache / "shards").glob("*.arrow"))
    return load_dataset("arrow", data_files=files, split="train", streaming=True)


def flat(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    array = column.combine_chunks()
    values = array.flatten()
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    lengths = array.value_lengths().to_numpy()
    return values.to_numpy(), np.concatenate([[0], np.cumsum(lengths)])


def joined(rows: Sequence[dict[str, Any]], keep: int) -> dict[str, NDArray[Any]]:
    found = {name: np.concatenate([row[name] for row in rows]) for name in COLUMNS}
    num_entries = int(found["k"][:keep].sum(dtype=np.int64))
    per_entry = ("top_ids", "top_logits")
    return {name: v[: num_entries if name in per_entry else keep] for name, v in found.items()}


def waiting(cache: Path, train_tokens_per_s: float) -> dict[str, float]:
    """Waits of a consumer that trains at a given speed, for its first step and afterwards."""
    data, selection = open_data([cache]), TokenSelection(LEAD_SPAN)
    start_s, first_s, first_wait_s = time.perf_counter(), 0.0, 0.0
    with TraceStream(data, selection, batch_traces=BATCH_TRACES, num_epochs=1) as stream:
        for step in stream:
            first_s = first_s or time.perf_counter() - start_s
            time.sleep(sum(len(item.trace.token_ids) for item in step.traces) / train_tokens_per_s)
            first_wait_s = first_wait_s or stream.wait_s
    after_s = time.perf_counter() - start_s - first_s
    return {"wait_share": (stream.wait_s - first_wait_s) / after_s, "first_step_s": first_s}


# --- measuring ---------------------------------------------------------------------------------


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for name in (OURS, ROWS, TABLES):
            rounds.setdefault(name, []).append(run_child(name, folder, arguments))
        for name in MOSAIC if arguments.mosaic_python else ():
            answer = mosaic(arguments.mosaic_python, "read", folder / name, str(LEAD_SPAN))
            rounds.setdefault(name, []).append(json.loads(answer))
    expected = {name: rounds[OURS][0][name] for name in ("num_tokens", "num_entries", "checksum")}
    for name, results in rounds.items():
        if any(result[key] != value for result in results for key, value in expected.items()):
            raise ValueError(f"{name} delivered other data than {OURS}")
    whole = {
        OURS: size_bytes(folder / "cache" / "shards"), ROWS: 0, TABLES: 0,
        **{name: size_bytes(folder / name) for name in MOSAIC},
    }  # fmt: skip
    whole[ROWS] = whole[TABLES] = whole[OURS]
    results = {}
    for name, found in rounds.items():
        median = {key: statistics.median(item[key] for item in found) for key in found[0]}
        results[name] = {
            "tokens_per_s": median["num_tokens"] / median["cpu_s"],
            "tokens_per_s_wall": median["num_tokens"] / median["wall_s"],
            "bytes_fraction_at_0.5": median["num_bytes"] / whole[name],
            "bytes_on_disk": whole[name],
            "peak_rss_bytes": median["peak_rss_bytes"],
        }
    order = data_order(open_data([folder / "cache"]), seed=0, epoch=0)
    shuffles = {f"ours, {n:,} shards": shuffle_figures(order_of(n)) for n in SHARDS_OF_QUALITY}
    for block in PY1E_BLOCKS if arguments.mosaic_python else ():
        py1e = py1e_order(arguments.mosaic_python, SHARDS_OF_QUALITY[-1], block)
        name = f"py1e, {SHARDS_OF_QUALITY[-1]:,} shards, blocks of {block:,}"
        shuffles[name] = shuffle_figures(py1e)
    waits = run_child("wait", folder, arguments)
    ours = results[OURS]
    return {
        **ours,
        "times_faster_than": {
            name: ours["tokens_per_s"] / item["tokens_per_s"]
            for name, item in results.items()
            if name != OURS
        },
        "wait_share": waits["wait_share"],
        "first_step_s": waits["first_step_s"],
        "train_tokens_per_s": arguments.train_tokens_per_s,
        "num_tokens": expected["num_tokens"],
        "num_shards": len(open_cache(folder / "cache").shards),
        "shuffle": {"this cache": shuffle_figures(order), **shuffles},
        "results": results,
    }


def run_child(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    command += ["--train-tokens-per-s", str(arguments.train_tokens_per_s)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def mosaic(python: str, *arguments: str | Path) -> str:
    script = Path(__file__).with_name("bench_stream_mosaic.py")
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return done.splitlines()[-1] if done else ""


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def shuffle_figures(order: EpochOrder) -> dict[str, float]:
    """Distance of neighbours, relative to a full permutation's, and what waits at most."""
    by_place = np.lexsort((order.row, order.shard))  # the epoch's places, shard by shard
    neighbours = np.diff(order.shard[by_place]) == 0
    distances = np.abs(np.diff(by_place))[neighbours]
    return {
        "quality": float(distances.mean() / ((len(order) + 1) / 3)),  # the mean of permutations
        "most_waiting": most_waiting(order.shard, np.ones(len(order))) / len(order),
    }


def order_of(num_shards: int) -> EpochOrder:
    """The order of a cache of this many shards."""
    shard, row = np.divmod(np.arange(num_shards * TRACES_PER_SHARD), TRACES_PER_SHARD)
    return epoch_order(shard, row, seed=0, epoch=0, fingerprint="bench")


def py1e_order(python: str, num_shards: int, block: int) -> EpochOrder:
    """The order of the same traces by MosaicML's own function."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "order.npy")
        mosaic(python, "order", str(num_shards), str(TRACES_PER_SHARD), str(block), file)
        return EpochOrder(*np.divmod(np.load(file), TRACES_PER_SHARD))


def show(found: dict[str, Any]) -> None:
    num_tokens, num_shards = found["num_tokens"], found["num_shards"]
    print(f"{num_tokens:,.0f} tokens at lead span {LEAD_SPAN} of {num_shards} shards")
    print(f"{'':26}{'tokens/s':>12}{'wall':>12}{'bytes read':>12}{'disk MB':>10}{'peak MB':>10}")
    for name, item in found["results"].items():
        print(
            f"{name:26}{item['tokens_per_s']:12,.0f}{item['tokens_per_s_wall']:12,.0f}"
            f"{item['bytes_fraction_at_0.5']:12.3f}{item['bytes_on_disk'] / 1e6:10.1f}"
            f"{item['peak_rss_bytes'] / 1e6:10.0f}"
        )
    print(
        f"at {found['train_tokens_per_s']:,.0f} tokens/s waits {found['wait_share']:.4f} of the "
        f"time, and {found['first_step_s']:.2f} s for the first step"
    )
    times = found["times_faster_than"].items()
    print("times faster than " + ", ".join(f"{name}: {value:.1f}" for name, value in times))
    for name, item in found["shuffle"].items():
        print(
            f"shuffle of {name}: quality {item['quality']:.2f}, "
            f"{item['most_waiting']:.2f} of the epoch waits at most"
        )


if __name__ == "__main__":
    main()
