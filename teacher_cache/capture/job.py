"""The job of a capture as the user requested it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.capture.worker_loop import Work
from teacher_cache.engines import Teacher, TeacherFacts, TeacherRequest
from teacher_cache.format import CacheHeader, CachePath, InputShare
from teacher_cache.sources import InputTraces, Rejects, SourceTrace
from teacher_cache.sources.tokenizer import TeacherTokenizer

ONLY_WORKER = "w0"  # name of a sole worker; others leave sealing to `cache-teacher seal`


@dataclass(frozen=True, kw_only=True)
class Job:
    """A capture, whether it generates or scores traces."""

    out: CachePath
    journal: Path | None  # None for the cache's own folder, or the default for a URI
    worker: str
    part: InputShare | None = None  # of the input, if several workers share it
    on_cluster: bool = False  # whether it has several workers, all its own
    limit: int | None  # traces of the whole input; the rest is only counted
    config: Mapping[str, Any]  # resolved, JSON; kept in the cache for the reader
    source: InputTraces
    tokenizer: TeacherTokenizer
    requests: Callable[[SourceTrace], list[TeacherRequest]]
    header: Callable[[TeacherFacts], CacheHeader]
    # Takes the length of the longest trace, in tokens, and optionally the `head_dtype`.
    start_teacher: Callable[..., Teacher]

    @property
    def is_whole(self) -> bool:
        """Whether the cache is complete when this job is: no other writer is known."""
        return self.on_cluster or self.worker == ONLY_WORKER

    def is_ours(self, source: SourceTrace) -> bool:
        """Whether a row is this worker's; all samples of a prompt go to the same worker."""
        return self.part is None or self.part.holds(source.trace_id)

    def wanted(self, rejects: Rejects) -> Iterator[Work]:
        """Yield every request of the input in order; rows without one go to `rejects`."""
        for source in self.source.read(rejects):
            for request in self.requests(source):
                yield source, request

    def work(self) -> Iterator[Work]:
        """Yield this worker's requests."""
        for source, request in islice(self.wanted(Rejects()), self.limit):
            if self.is_ours(source):
                yield source, request

    def without(self, done: NDArray[np.bool_], num_requests: int) -> "Job":
        """The job without rows that nothing is left to do for.

        Args:
            done: [rows of the input] whether a row is one of these.
            num_requests: Requests of these rows, all under the limit.
        """
        limit = None if self.limit is None else self.limit - num_requests
        return replace(self, limit=limit, source=replace(self.source, passed_over=done))

    def file_name(self, name: str, suffix: str) -> str:
        """Name of a file about the input: workers with plain names may have their own inputs."""
        shared = self.is_whole or self.part is not None
        return f"{name}.{suffix}" if shared else f"{name}-{self.worker}.{suffix}"
