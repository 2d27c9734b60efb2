"""One engine replica as an actor: it claims requests, keeps its traces, and reports their ids.

Nothing here depends on Ray; `ray_driver.py` runs it in its own process, with threads: `work` in
one, `exchange` and `stop` in others.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from teacher_cache.capture.noise import Repeats
from teacher_cache.capture.worker_loop import Done, Work, run_requests
from teacher_cache.engines import Teacher, TeacherFacts
from teacher_cache.format import CacheHeader, CachePath, CacheWriter
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.terminal.stop_signals import Stopped

UNIT_TRACES = 32  # claimed at a time; more are claimed when fewer wait
_LONGEST_WAIT_S = 1.0  # wait for something to report


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica stores its traces, and under which worker's name."""

    out: CachePath
    journal: Path | None
    header: CacheHeader
    config: Mapping[str, Any]
    worker: str


@dataclass(frozen=True)
class Report:
    """Events since the last report."""

    done: tuple[Done, ...]
    num_waiting: int  # claimed, but not yet with the teacher


class Replica:
    """A teacher with its own journal and shards."""

    def __init__(
        self, start_teacher: Callable[[int], Teacher], tokenizer: TeacherTokenizer
    ) -> None:
        self._start_teacher = start_teacher
        self._tokenizer = tokenizer
        self._changed = threading.Condition()
        self._claimed = _Claimed(self._changed)
        self._done: list[Done] = []
        self._writer: CacheWriter | None = None
        self._is_last = False
        self._is_stopped = False

    def start(self, longest: int) -> TeacherFacts:
        """Start the engine; takes minutes for a large model."""
        os.dup2(2, 1)  # the driver's stdout is for results
        self._teacher = self._start_teacher(longest)
        return self._teacher.facts

    def open(self, place: Place, request_ids: Sequence[str]) -> list[str]:
        """Open the cache; return which of these an earlier process of this worker has kept."""
        self._writer = CacheWriter(
            place.out,
            place.header,
            config=place.config,
            worker=place.worker,
            journal=place.journal,
        )
        return [each for each in request_ids if each in self._writer.finished()]

    def work(self) -> None:
        """Run claimed requests until the last is in a shard; raises as `run_requests`."""
        if self._writer is None:
            raise RuntimeError("call `open` before `work`")
        with closing(self._teacher), self._writer as writer:
            repeats = Repeats()
            try:
                while self._wait_for_claims():
                    run_requests(
                        self._claimed,
                        self._teacher,
                        writer,
                        self._tokenizer,
                        self._note,
                        self._hold,
                        repeats,
                    )
                noise = None if self._is_stopped else repeats.measure(self._teacher)
                if noise is not None:
                    writer.keep_noise(noise)
                with self._hold():
                    writer.finish()
            except Stopped:
                return

    def exchange(self, unit: Sequence[Work], is_last: bool) -> Report:
        """Claim more and report finished traces; waits briefly if there is nothing to report."""
        with self._changed:
            self._claimed.queue.extend(unit)
            self._is_last = is_last
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done or self._is_hungry(), _LONGEST_WAIT_S)
            done, self._done = self._done, []
            return Report(tuple(done), len(self._claimed.queue))

    def stop(self) -> None:
        """Finish the current write and start no other."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            if self._writer is not None:
                self._writer.close()

    def _is_hungry(self) -> bool:
        return not self._is_last and len(self._claimed.queue) < UNIT_TRACES

    def _wait_for_claims(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._claimed.queue or self._is_last or self._is_stopped)
            return bool(self._claimed.queue) and not self._is_stopped

    def _note(self, done: Done) -> None:
        with self._changed:
            self._done.append(done)
            self._changed.notify_all()

    @contextmanager
    def _hold(self) -> Iterator[None]:
        with self._changed:
            if self._is_stopped:
                raise Stopped(signal.SIGTERM)
            yield


class _Claimed:
    """An iterator that ends when nothing waits, and resumes when something does."""

    def __init__(self, lock: threading.Condition) -> None:
        self.queue: deque[Work] = deque()
        self._lock = lock

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Work:
        with self._lock:
            if not self.queue:
                raise StopIteration
            return self.queue.popleft()
