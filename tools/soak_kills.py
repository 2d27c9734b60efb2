"""A capture killed again and again: nothing may be lost, repeated or changed.

    python tools/soak.py kills --kills 500 --seed 0 --workers 3

Every attempt is a process of `cache-teacher generate` with a table as its teacher and shards of a
few traces, so that it compacts and publishes all the time. It is killed at a random moment, or at
a chosen one: while a file is published, between a shard and its commit record, while a full
journal waits, after the commit record, while the cache is sealed. Some are asked to stop instead
(SIGTERM, SIGINT). A complete cache is compared with that of an undisturbed run, and the next one
begins.
"""

from __future__ import annotations

import argparse
import collections
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache import cli
from teacher_cache.capture import run as capture_module
from teacher_cache.capture.job import ONLY_WORKER, Job
from teacher_cache.capture.run import capture
from teacher_cache.cli import capturing
from teacher_cache.engines import TeacherFacts, TeacherRequest, TeacherRows
from teacher_cache.format import CacheHeader, CachePath, CacheWriter, Trace, open_cache, seal_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.sources import Rejects, SourceTrace
from teacher_cache.sources.row import Row

VOCAB_SIZE = 64
NUM_TRACES = 240
SHARD_BYTES = 5000  # about six traces
AIM_TIMEOUT_S = 0.3  # then it is killed, wherever it is
COLUMNS = ("token_ids", "k", "top_ids", "top_logits", "tail_logit")
RUNS = multiprocessing.get_context("forkserver")  # a process that has imported all this forks
RUNS.set_forkserver_preload(["__main__", "soak_kills"])


@functools.cache
def table() -> tuple[np.ndarray, np.ndarray]:
    """Logprobs of every token after each, and the ids of the best eight."""
    logits = np.random.default_rng(7).normal(0, 2, (VOCAB_SIZE, VOCAB_SIZE))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs.astype(np.float32), np.argsort(-logprobs, axis=1)[:, :8].astype(np.int32)


class TableTeacher:
    """Teacher whose next token depends only on the last one; a trace depends on its number."""

    facts = TeacherFacts("table", "1", "float32", "float32", VOCAB_SIZE, 256)

    def run(self, requests: Iterator[TeacherRequest]) -> Iterator[TeacherRows]:
        """Every request at once, in its order."""
        print("running", flush=True)
        logprobs, best = table()
        for request in requests:
            rng = np.random.default_rng(request.seed)
            new = rng.integers(0, VOCAB_SIZE, request.max_new_tokens)
            tokens = np.concatenate([request.token_ids, new]).astype(np.int32)
            first = len(request.token_ids)
            before, after = tokens[first - 1 : -1], tokens[first:]
            ids = np.concatenate([after[:, None], best[before]], axis=1)
            rows = logprobs[before[:, None], ids]
            yield TeacherRows(request.request_id, tokens, first, first, ids, rows, "stop")

    def close(self) -> None:
        """Nothing to free."""


TOKENIZER = SimpleNamespace(
    content_hash="", terminal_ids=(), template=SimpleNamespace(text="")
)  # all that a capture asks of it


@dataclass
class Items:
    """Every `of`-th prompt: what one worker has to do."""

    first: int
    of: int
    num_traces: int = NUM_TRACES
    path: str = "prompts"
    only_ids: None = None  # all
    passed_over: NDArray[np.bool_] | None = None  # as in `InputTraces`

    @property
    def input(self) -> list[Row]:
        """The rows, as far as a capture looks at them itself."""
        numbers = range(self.first, self.num_traces, self.of)
        return [Row(self.path, number, b"%d" % number) for number in numbers]

    def read(self, rejects: Rejects) -> Iterator[SourceTrace]:
        """Every request that is left; none is rejected."""
        return (trace for _, trace in self.read_numbered(rejects))

    def read_numbered(
        self, rejects: Rejects, on_row: Callable[[Row], None] = lambda row: None
    ) -> Iterator[tuple[int, SourceTrace]]:
        """The same, each with the number of its row."""
        for row, content in enumerate(self.input):
            on_row(content)
            number = content.number
            if self.passed_over is None or not self.passed_over[row]:
                ids = (1, 2, number % VOCAB_SIZE)
                yield row, SourceTrace(f"t{number}", ids, 3, (4, 9), {"n": number})


def requests(item: SourceTrace) -> list[TeacherRequest]:
    number = int(item.trace_id[1:])
    return [TeacherRequest(item.trace_id, item.token_ids, 20 + number % 50, number, False)]


def header(facts: TeacherFacts) -> CacheHeader:
    return CacheHeader(
        mode="generate", teacher="table", teacher_revision=None, teacher_fingerprint="",
        engine=facts.engine, engine_version=facts.engine_version, dtype=facts.dtype,
        head_dtype=facts.head_dtype, vocab_size=facts.vocab_size, tokenizer_size=VOCAB_SIZE,
        tokenizer_fingerprint="", chat_template_hash="", think_open_ids=(), think_close_ids=(),
        terminal_token_ids=(), sampling=None, top_k=8, mass=0.99, capture_prompt=False, num_bands=4,
    )  # fmt: skip


def work(folder: str, worker: str, items: Items, said: str, *more: str) -> None:
    """Act as `cache-teacher generate` with its own teacher and input; log to one file."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    capture_module.CacheWriter = functools.partial(  # type: ignore[misc]  # smaller shards
        CacheWriter, shard_bytes=SHARD_BYTES
    )
    capturing.generate = lambda config: capture(
        Job(
            out=config.out, journal=config.journal, worker=config.worker, limit=None, config={},
            source=items, tokenizer=TOKENIZER, requests=requests, header=header,
            start_teacher=lambda _longest, **_: TableTeacher(),
        )  # type: ignore[arg-type]  # a source that is no file, and a tokenizer that is not asked
    )  # fmt: skip
    options = ["--model", "table", "--prompts", "prompts", "--out", folder, "--worker", worker]
    sys.argv = ["cache-teacher", "generate", *options, *more]
    try:
        cli.program()
    except KeyboardInterrupt:  # before program() takes care of it
        sys.exit(128 + signal.SIGINT)


@dataclass
class Outcome:
    """Figures of a series."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by aim
    stops: int = 0  # signals that were answered with exit code 128 + n
    restarts: int = 0
    caches: int = 0
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    findings: list[str] = field(default_factory=list)


def publishing(folder: Path) -> bool:
    return any(name.startswith(".tmp-") for name in listed(folder / "shards"))


def between_shard_and_record(folder: Path) -> bool:
    names = listed(folder / "shards")
    return any(n.endswith(".arrow") and n[:-5] + "json" not in names for n in names)


def full_journal_waits(folder: Path) -> bool:
    workers = [name.partition("-")[0] for name in journals(folder)]
    return len(set(workers)) < len(workers)


def record_before_journal_is_gone(folder: Path) -> bool:
    names = listed(folder / "shards")
    return any(name.removesuffix("journal") + "json" in names for name in journals(folder))


def sealing(folder: Path) -> bool:
    return any(name.startswith(".tmp-") for name in listed(folder))


def is_running(said: Path) -> bool:
    return said.exists() and "running" in said.read_text()


def journals(folder: Path) -> list[str]:
    return [name for name in listed(folder / "journal") if name.endswith(".journal")]


def listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (spins: a Path for each name is slow)
    except FileNotFoundError:
        return set()


AIMS: tuple[Callable[[Path], bool] | None, ...] = (
    None, None, publishing, publishing, between_shard_and_record, full_journal_waits,
    record_before_journal_is_gone, sealing,
)  # fmt: skip


class Series:
    """One cache at a time, written by processes that are killed."""

    def __init__(self, folder: Path, num_workers: int, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        names = [ONLY_WORKER] if num_workers == 1 else [f"part{n}" for n in range(num_workers)]
        self.items = {name: Items(number, num_workers) for number, name in enumerate(names)}
        self.outcome = Outcome()

    def run(self, num_kills: int) -> Outcome:
        """Write cache after cache, until enough processes have been killed."""
        expected = self._undisturbed()
        while self.outcome.kills.total() < num_kills and not self.outcome.findings:
            cache = self.folder / f"cache-{self.outcome.caches}"
            self._write(cache, num_kills)
            if not self.outcome.findings:
                self._compare(cache, expected)
            self.outcome.caches += 1
        return self.outcome

    def _undisturbed(self) -> dict[str, Trace]:
        cache = self.folder / "undisturbed"
        processes = [self._start(cache, worker) for worker in self.items]
        for process in processes:
            process.join()
        seal_cache(cache)
        return read_all(cache)

    def _start(self, cache: Path, worker: str) -> Any:  # noqa: ANN401 (of the context)
        arguments = (str(cache), worker, self.items[worker], str(self._said(worker)))
        process = RUNS.Process(target=work, args=arguments)
        self._said(worker).unlink(missing_ok=True)
        process.start()
        return process

    def _said(self, worker: str) -> Path:
        return self.folder / f"{worker}.txt"

    def _write(self, cache: Path, num_kills: int) -> None:
        """Complete a cache, despite one kill after another."""
        running = {worker: self._start(cache, worker) for worker in self.items}
        while running:
            worker = list(running)[int(self.rng.integers(len(running)))]
            process = running[worker]
            if self.outcome.kills.total() >= num_kills:
                process.join()
            else:
                self._disturb(process, cache, self._said(worker))
            code = process.exitcode
            del running[worker]
            if code == 0:
                continue
            said = self._said(worker)
            text = said.read_text() if said.exists() else ""
            if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                self.outcome.stops += "run the same command again to resume" in text
            elif code not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
                self.outcome.findings.append(f"{worker} ended with {code}: {text[-2000:]}")
                return
            running[worker] = self._start(cache, worker)
            self.outcome.restarts += 1
        seal_cache(cache)

    def _disturb(self, process: Any, cache: Path, said: Path) -> None:  # noqa: ANN401 (as above)
        """Wait for the moment, then end the process."""
        aim = AIMS[int(self.rng.integers(len(AIMS)))]
        wait_s = float(self.rng.uniform(0, AIM_TIMEOUT_S)) if aim is None else AIM_TIMEOUT_S
        which = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        signum = which[int(self.rng.choice(3, p=[0.8, 0.1, 0.1]))]
        # Before this the capture has not started: a signal just ends it, and few aims are in reach.
        while (aim or signum != signal.SIGKILL) and process.is_alive() and not is_running(said):
            time.sleep(0.001)
        until_s = time.monotonic() + wait_s
        hit = False
        while process.is_alive() and time.monotonic() < until_s and not hit:
            hit = aim is not None and aim(cache)
            time.sleep(0.0002)  # the process needs the processor too
        if process.is_alive():
            os.kill(process.pid, signum)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.outcome.kills[aim.__name__ if aim is not None and hit else "at random"] += 1

    def _compare(self, cache: Path, expected: dict[str, Trace]) -> None:
        outcome = self.outcome
        seal = open_cache(cache).manifest.seal
        found = read_all(cache)
        outcome.lost += len(expected.keys() - found.keys())
        outcome.duplicated += 0 if seal is None else seal.num_duplicates
        outcome.changed += sum(not same(found[name], expected[name]) for name in found)
        outcome.findings += [f"{cache.name}: {error}" for error in verify_cache(cache).errors]
        left = [*journals(cache), *(n for n in listed(cache / "shards") if n.startswith(".tmp-"))]
        outcome.findings += [f"{cache.name}: {name} was left behind" for name in left]


def read_all(folder: CachePath) -> dict[str, Trace]:
    cache = open_cache(folder)
    found = {}
    for shard, row in cache.traces:
        n_total = cache.shards[shard].traces[row].n_total
        trace = cache.read(shard, {row: n_total})[row]
        found[trace.trace_id] = trace
    return found


def same(one: Trace, other: Trace) -> bool:
    facts = ("trace_id", "n_total", "cot_start", "answer_start", "finish_reason", "fields")
    return all(getattr(one, name) == getattr(other, name) for name in facts) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS
    )


def kill_captures(folder: Path, num_kills: int, *, num_workers: int, seed: int) -> Outcome:
    """Kill captures until `num_kills` have died, and check every cache that they leave."""
    return Series(folder, num_workers, seed).run(num_kills)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> None:
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_captures(
            Path(folder), arguments.kills, num_workers=arguments.workers, seed=arguments.seed
        )
    for aim, count in outcome.kills.most_common():
        print(f"{aim.replace('_', ' '):32} {count:>6,} kills")
    print(
        f"{outcome.kills.total():,} kills and {outcome.stops:,} stops, {outcome.restarts:,} "
        f"restarts, {outcome.caches:,} caches of {NUM_TRACES} traces, {arguments.workers} workers, "
        f"{time.monotonic() - start_s:.0f} s: {outcome.lost} lost, {outcome.duplicated} "
        f"duplicated, {outcome.changed} changed"
    )
    for finding in outcome.findings[:20]:
        print(finding)
    bad = outcome.lost + outcome.duplicated + outcome.changed + len(outcome.findings)
    sys.exit(bool(bad))
