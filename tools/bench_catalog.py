"""Time, memory and requests of opening a cache, by its number of traces.

    python tools/bench_catalog.py --traces 10000 100000 1000000
    python tools/bench_catalog.py --traces 10000 --s3        # counts requests; needs moto

Shards have 100 traces each. They are empty files of the right size: no bench here reads one. Every
figure is of a process of its own, without the imports; memory is its largest, with them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from student_train.data.draw import SpanFigures, draw_spans
from student_train.data.order import data_order
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.examine.measured import section_lengths
from teacher_cache.format import CacheWriter, FinishedTrace, open_cache, seal_cache
from teacher_cache.format.commit import ShardCommit, TraceInfo, block_of
from teacher_cache.format.store import open_store

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from bench_json import write_figures
from fakes import make_header, make_trace
from s3_server import s3_server

TRACES_PER_SHARD = 100
BLOCK_BYTES = 100_000
WHERE = 'verdict == "correct" and n_total < 4000'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=int, nargs="+", default=[10_000], help="sizes of caches")
    parser.add_argument("--s3", action="store_true", help="from an S3 server on loopback")
    parser.add_argument("--keep", type=Path, help="folder for the caches; left there for reuse")
    parser.add_argument("--only", choices=list(WORK), nargs="+", help="just these figures")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    wanted = arguments.only or (["open"] if arguments.s3 else list(WORK))
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number in arguments.traces:
            folder = (arguments.keep or Path(temporary)) / f"traces-{number}"
            if not folder.exists():
                make_cache(folder, number)
            rows = figures[f"{number} traces"] = dict(of_cache(folder, wanted, arguments.s3))
            for name, row in rows.items():
                shown = ", ".join(f"{key} {value:,.2f}" for key, value in row.items())
                print(f"{number:>9,} traces  {name:<10} {shown}", flush=True)
    write_figures(arguments.json, figures)


def make_cache(folder: Path, num_traces: int) -> None:
    """Write the records of a cache that is not sealed, and files that look like its shards."""
    header = make_header()
    CacheWriter(folder, header).close()
    rng = random.Random(0)
    for shard, first in enumerate(range(0, num_traces, TRACES_PER_SHARD)):
        numbers = range(first, min(first + TRACES_PER_SHARD, num_traces))
        commit = made_commit(f"w0-{shard:05d}", [made_info(n, rng) for n in numbers], header)
        file = folder / "shards" / f"{commit.name}.arrow"
        file.touch()
        os.truncate(file, commit.size_bytes)
        file.with_suffix(".json").write_bytes(commit.to_bytes())


def made_info(number: int, rng: random.Random) -> TraceInfo:
    n_total = int(rng.lognormvariate(7.5, 0.6)) + 40
    return TraceInfo(
        trace_id=f"numina-{number:07d}",
        n_total=n_total,
        cot_start=20,
        answer_start=n_total * 9 // 10,
        finish_reason="length" if rng.random() < 0.05 else "stop",
        source_hash=f"{rng.getrandbits(128):032x}",
        fields={
            "answer": str(rng.randrange(10_000)),
            "verdict": rng.choice(["correct", "wrong"]),
            "level": rng.randrange(1, 6),
        },
    )


def made_commit(name: str, infos: list[TraceInfo], header: Any) -> ShardCommit:  # noqa: ANN401
    num_bands = header.num_bands
    blocks = []
    for b in range(num_bands):
        tokens = sum(t.n_total * (b + 1) // num_bands - t.n_total * b // num_bands for t in infos)
        blocks.append(
            replace(block_of(b"", b * BLOCK_BYTES, len(infos), tokens), length=BLOCK_BYTES)
        )
    return ShardCommit(
        name=name,
        header_fingerprint=header.fingerprint,
        size_bytes=num_bands * BLOCK_BYTES + 1000,
        sha256=f"{hash(name) & (1 << 256) - 1:064x}",
        num_entries=15 * sum(t.n_total for t in infos),
        num_clamped_tails=0,
        num_clamped_logits=0,
        blocks=tuple(blocks),
        traces=tuple(infos),
    )


def of_cache(folder: Path, wanted: list[str], on_s3: bool) -> Any:  # noqa: ANN401
    """Figures of one cache, each measured in a process of its own."""
    if "resume" in wanted:  # first, as it needs a cache without a seal
        yield "resume", in_process("resume", str(folder))
    if "seal" in wanted or on_s3 or any(name != "resume" for name in wanted):
        figures = in_process("seal", str(folder))
        if "seal" in wanted:
            yield "seal", figures
    with ExitStack() as stack:
        place: str = str(folder)
        if on_s3:
            place, requests = stack.enter_context(uploaded(folder))
        for name in wanted:
            if name not in ("resume", "seal"):
                before = requests() if on_s3 else 0
                row = in_process(name, place)
                yield name, row | ({"requests": requests() - before} if on_s3 else {})
    if "resume" in wanted or "seal" in wanted:
        unseal(folder)


@contextmanager
def uploaded(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """The URI of a copy in a bucket, and a count of the requests so far."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it tells of every request
    with s3_server() as (proxy, uri):
        store = open_store(uri("cache"))
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix in (".json", ".parquet", ".arrow"):
                store.publish(str(file.relative_to(folder)), file.read_bytes())
        yield uri("cache"), lambda: proxy.num_requests


def unseal(folder: Path) -> None:
    """Take the seal off, for the next run on this folder."""
    file = folder / "cache.json"
    record = json.loads(file.read_bytes())
    if record.pop("seal", None) is not None:
        record["complete"] = False
        record.pop("checksum")
        file.write_text(json.dumps(record))


def in_process(name: str, place: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, place]
    found: dict[str, float] = json.loads(subprocess.check_output(command))
    return found


def measure(name: str, place: str) -> dict[str, float]:
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    WORK[name](place)
    return {
        "seconds": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def resume(place: str) -> None:
    """What a writer does before its first trace, and its first trace."""
    copy = Path(place).with_name("resumed")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy(Path(place) / "cache.json", copy)
    (copy / "shards").symlink_to((Path(place) / "shards").resolve())
    with CacheWriter(copy, make_header(), worker="other") as writer:
        if "numina-0000001" not in writer.finished():
            raise AssertionError("a finished trace is not known")
        writer.append(FinishedTrace(make_trace("new", 30), "source"))
    shutil.rmtree(copy)


def start_training(place: str) -> None:
    """Everything that a run needs to know before it reads its first shard."""
    data = open_data([place], where=WHERE, heldout_share=0.01)
    selection = TokenSelection(lead_span=0.5)
    drawn = [draw_spans(source, selection, 0) for source in data.sources]
    SpanFigures.of(drawn)
    data_order(data, seed=0, epoch=0)


WORK: Mapping[str, Callable[[str], object]] = {
    "seal": lambda place: seal_cache(place),
    "resume": resume,
    "open": lambda place: open_cache(place),
    "where": lambda place: open_data([place], where=WHERE),
    "heldout": lambda place: open_data([place], heldout_share=0.01),
    "lengths": lambda place: section_lengths(open_cache(place)),
    "train": start_training,
}

if __name__ == "__main__":
    main()
