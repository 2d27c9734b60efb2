"""The job of a capture as the user requested it, and a survey of its input."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from teacher_cache.capture.worker_loop import Work
from teacher_cache.engines import Teacher, TeacherFacts, TeacherRequest
from teacher_cache.format import CacheHeader, CachePath, InputShare, open_store, shown
from teacher_cache.sources import (
    PROMPT_LIKE_COLUMNS,
    InputTraces,
    Rejects,
    SourceError,
    SourceTrace,
)
from teacher_cache.sources.tokenizer import TeacherTokenizer

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 10.0  # interval of messages while the input is read
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
    start_teacher: Callable[[int], Teacher]  # takes the length of the longest trace, in tokens

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


@dataclass(frozen=True)
class Survey:
    """The input's work for this worker, and how much of it is left."""

    num_wanted: int  # traces, ignoring the limit
    num_taken: int  # under the limit
    num_missing: int  # of these, not yet in the cache
    longest: int  # tokens that the engine must have room for
    num_rejected: int  # rows of the input that cannot be used
    num_input: int  # traces under the limit, of all workers together
    input_hash: str  # of these


def take_survey(job: Job, finished: Mapping[str, str]) -> Survey:
    """Render every row once: a bad row found after two days of capture is found too late.

    Args:
        job: Job with the input and the cache.
        finished: trace_id -> source_hash of traces in the cache.

    Raises:
        SourceError: If the input has nothing usable, a bad row under `strict`, or a
            finished trace whose row has changed since.
    """
    num_wanted = num_taken = num_missing = num_input = longest = 0
    digest = hashlib.sha256()
    rejects = Rejects()
    found: set[str] = set()
    has_thought = False
    said_at_s = time.monotonic()
    for source, request in job.wanted(rejects):
        if time.monotonic() - said_at_s >= _SAY_EVERY_S:
            said_at_s = time.monotonic()
            logger.info("reading %s: %d rows so far", job.source.path, len(found) + rejects.total)
        if not found:
            _say_passed_over(job, source)
        has_thought = has_thought or source.bounds is None or source.bounds[0] < source.bounds[1]
        found.add(source.trace_id)
        known = finished.get(request.request_id)
        if known is not None and known != source.source_hash:
            raise SourceError(
                f"{job.source.path}: trace {request.request_id!r} is already in {shown(job.out)}, "
                "made from other content. Give the changed row a new id, or write to another "
                "folder."
            )
        is_taken = job.limit is None or num_input < job.limit
        if is_taken:
            num_input += 1
            digest.update(f"{request.request_id}\n{source.source_hash}\n".encode())
        if job.is_ours(source):
            num_wanted += 1
            num_taken += is_taken
            num_missing += is_taken and known is None
            longest = max(longest, len(request.token_ids) + request.max_new_tokens)
    if num_input == 0:
        raise SourceError(
            f"{job.source.path}: expected at least one usable row, found none"
            + (f" ({rejects.most_frequent()})" if rejects.total else "")
        )
    if not has_thought:
        logger.warning(
            "%s: none of its %d traces has a chain of thought; if they should, run "
            "cache-teacher preview on them",
            job.source.path, len(found),
        )  # fmt: skip
    job.source.say_missing_ids(found | rejects.ids)
    rejects.publish(open_store(job.out), _rejects_name(job))
    return Survey(
        num_wanted,
        num_taken,
        num_missing,
        longest,
        rejects.total,
        num_input,
        digest.hexdigest()[:32],
    )


def _say_passed_over(job: Job, source: SourceTrace) -> None:
    """Report columns that look like prompts but were left as the user's own fields."""
    over = [name for name in PROMPT_LIKE_COLUMNS if name in source.fields]
    if over:
        logger.info(
            "%s: left as fields of the traces: %s; --prompt-field names the column of the prompt",
            job.source.path, ", ".join(over),
        )  # fmt: skip


def _rejects_name(job: Job) -> str:
    """File name for the rejects: workers with plain names may have their own inputs."""
    shared = job.is_whole or job.part is not None
    return "rejects.jsonl" if shared else f"rejects-{job.worker}.jsonl"
