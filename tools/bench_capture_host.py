"""CPU time of a capture's own parts per token, by the length of traces and the entries kept.

    python tools/bench_capture_host.py

No engine and no other process: rows of made-up distributions come through the ring as a worker
writes them, one of every trace in flight per step, and go the way of a capture: put together,
entries chosen, journal, shard. What a trace costs once, whatever its length, is most of the figure
where traces are short. The digest is of every byte of the shards, to compare two versions of the
code.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bench_json import write_figures
from numpy.typing import NDArray

from teacher_cache.capture.worker_loop import finished_trace
from teacher_cache.engines import TeacherRows
from teacher_cache.engines.vllm.ring import HEAD_WORDS, RowRing, row_words
from teacher_cache.engines.vllm.worker_rows import REQUEST_KEY, WorkerRows
from teacher_cache.format import CacheHeader, CacheWriter
from teacher_cache.format.writing import compaction
from teacher_cache.format.writing import writer as writer_module
from teacher_cache.sources import SourceTrace

VOCAB_SIZE, NUM_PROMPT = 448, 20
NO_TOKENIZER: Any = None  # sections are given
PARTS = ("rows", "choosing", "journal", "compaction")
# Response tokens, traces, and how sure the teacher is: the spread of its logits.
CASES = ((100, 256, 45.0), (1_000, 64, 45.0), (1_000, 64, 14.0), (4_000, 32, 14.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="us per token, by part and case")
    arguments = parser.parse_args()
    cases = []
    print(f"{'tokens':>7}{'entries':>9}" + "".join(f"{part:>12}" for part in PARTS) + "     all")
    for length, num_traces, spread in CASES:
        steps = [made(arguments.top_k, length, spread, n) for n in range(num_traces)]
        runs = [capture(steps, arguments.top_k) for _ in range(arguments.repeats)]
        us = {part: min(run.seconds[part] for run in runs) * 1e6 for part in PARTS}
        num_tokens = num_traces * length
        print(
            f"{length:7,}{runs[0].num_entries / num_tokens:9.1f}"
            + "".join(f"{us[part] / num_tokens:12.2f}" for part in PARTS)
            + f"{sum(us.values()) / num_tokens:8.2f} us  {runs[0].digest[:16]}"
        )
        entries = runs[0].num_entries / num_tokens
        found = {part: each / num_tokens for part, each in us.items()}
        cases.append({"name": f"{length} tokens, {entries:.1f} entries", "us_per_token": found})
    write_figures(arguments.json, {"cases": cases})


def made(top_k: int, length: int, spread: float, seed: int) -> NDArray[np.int32]:
    """[length, words] the rows of one trace, as a worker writes them."""
    random = np.random.default_rng(seed)
    scale = random.gamma(2.0, spread / 2, (length, 1))
    logits = (random.normal(0, 1, (length, VOCAB_SIZE)) * scale).astype(np.float32)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    tokens = (logprobs + random.gumbel(size=logprobs.shape)).argmax(1)
    best = np.argsort(-logprobs, axis=1)
    ids = np.concatenate([tokens[:, None], best[:, :top_k]], axis=1)
    outside = np.take_along_axis(logprobs, best[:, top_k:], axis=1)
    rows = np.empty((length, row_words(top_k)), np.int32)
    rows[:, 2] = np.arange(length)
    rows.view(np.float32)[:, HEAD_WORDS - 1] = np.logaddexp.reduce(outside, axis=1)
    middle = HEAD_WORDS + 1 + top_k
    rows[:, HEAD_WORDS:middle] = ids
    rows.view(np.float32)[:, middle:] = np.take_along_axis(logprobs, ids, axis=1)
    return rows


@dataclass
class Run:
    """One capture's CPU seconds by part, and what it wrote."""

    seconds: dict[str, float]
    num_entries: int = 0
    digest: str = ""

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Add this thread's time inside the block to a part."""
        begun_s = time.thread_time()
        try:
            yield
        finally:
            self.seconds[part] += time.thread_time() - begun_s


def capture(traces: list[NDArray[np.int32]], top_k: int) -> Run:
    run, compact = Run(dict.fromkeys(PARTS, 0.0)), compaction.compact

    def timed(*call: Any) -> None:  # noqa: ANN401 (as `compact`)
        with run.counted("compaction"):
            compact(*call)

    header = made_header(top_k)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(writer_module, "compact", timed),
    ):
        out = Path(folder) / "cache"
        writer = CacheWriter(out, header)
        for number, rows in enumerate(through_ring(run, traces, top_k)):
            source = SourceTrace(
                trace_id=rows.request_id, token_ids=tuple(range(NUM_PROMPT)),
                num_prompt=NUM_PROMPT, fields={"answer": number},
                bounds=(NUM_PROMPT, len(rows.token_ids) - 5),
            )  # fmt: skip
            with run.counted("choosing"):
                finished = finished_trace(rows, source, header, NO_TOKENIZER)
            run.num_entries += finished.trace.num_entries
            with run.counted("journal"):
                writer.append(finished)
        writer.finish()
        digest = hashlib.sha256()
        for path in sorted((out / "shards").glob("*.arrow")):
            digest.update(path.read_bytes())
        run.digest = digest.hexdigest()
    return run


def through_ring(run: Run, traces: list[NDArray[np.int32]], top_k: int) -> Iterator[TeacherRows]:
    """Every trace, all in flight at once and finished together, for the second time.

    The first time the reader's memory grows to what is in flight, once in a capture.
    """
    reader = WorkerRows(num_candidates=top_k, max_num_seqs=len(traces), engine_args={})
    reader.set_room(len(traces), len(traces[0]))
    worker = RowRing.opened(reader._ring.address)
    for _ in one_pass(Run(dict.fromkeys(PARTS, 0.0)), traces, reader, worker):
        pass
    yield from one_pass(run, traces, reader, worker)
    reader.close()


def one_pass(
    run: Run, traces: list[NDArray[np.int32]], reader: WorkerRows, worker: RowRing
) -> Iterator[TeacherRows]:
    tags = [reader.begin(NUM_PROMPT)[1][REQUEST_KEY] for _ in traces]
    together = np.stack(traces, axis=1)  # [steps, traces, words]
    together[:, :, :2] = [tag[:2] for tag in tags]
    for step in together:
        worker.write(step)
        with run.counted("rows"):
            reader.drain()
    for number, (slot, _, _) in enumerate(tags):
        with run.counted("rows"):
            found = reader.rows(slot, len(together))
            reader.end(slot)
        if found is None:
            raise SystemExit("rows are missing")
        ids, logprobs, tails = found
        tokens = np.concatenate([np.arange(NUM_PROMPT, dtype=np.int32), ids[:, 0]])
        yield TeacherRows(
            f"t{number}", tokens, NUM_PROMPT, NUM_PROMPT, ids, logprobs, "stop", tails
        )


def made_header(top_k: int) -> CacheHeader:
    return CacheHeader(
        mode="generate", teacher="made up", teacher_revision=None, teacher_fingerprint="0" * 32,
        engine="none", engine_version="1", dtype="float32", head_dtype="float32",
        vocab_size=VOCAB_SIZE, tokenizer_size=VOCAB_SIZE, tokenizer_fingerprint="0" * 32,
        chat_template_hash="", think_open_ids=(1,), think_close_ids=(2,), terminal_token_ids=(0,),
        sampling=None, top_k=top_k, mass=0.999, capture_prompt=False, num_bands=20,
    )  # fmt: skip


if __name__ == "__main__":
    main()
