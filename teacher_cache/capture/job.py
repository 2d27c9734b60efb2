"""What a capture has to do: the job as the user asked for it, and what its input holds."""

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

_SAY_EVERY_S = 10.0  # while the input is read
ONLY_WORKER = "w0"  # its name where there is one; others leave sealing to `cache-teacher seal`


@dataclass(frozen=True, kw_only=True)
class Job:
    """A capture, whichever way its traces come."""

    out: CachePath
    journal: Path | None  # where the cache's own folder, or the default for a URI, will not do
    worker: str
    part: InputShare | None = None  # of the input, where several workers share it
    on_cluster: bool = False  # its workers are several, and nobody else's
    limit: int | None  # traces of the whole input; the rest of it is only counted
    config: Mapping[str, Any]  # resolved, JSON; kept in the cache for the reader
    source: InputTraces
    tokenizer: TeacherTokenizer
    requests: Callable[[SourceTrace], list[TeacherRequest]]
    header: Callable[[TeacherFacts], CacheHeader]
    start_teacher: Callable[[int], Teacher]  # given the longest trace, in tokens

    @property
    def is_whole(self) -> bool:
        """Whether the cache is complete when this job is: nobody else is known to write to it."""
        return self.on_cluster or self.worker == ONLY_WORKER

    def is_ours(self, source: SourceTrace) -> bool:
        """Whether a row is this worker's; all the samples of a prompt are the same worker's."""
        return self.part is None or self.part.holds(source.trace_id)

    def wanted(self, rejects: Rejects) -> Iterator[Work]:
        """Every request of the input, in its order; rows that have none go to `rejects`."""
        for source in self.source.read(rejects):
            for request in self.requests(source):
                yield source, request

    def work(self) -> Iterator[Work]:
        """This worker's requests."""
        for source, request in islice(self.wanted(Rejects()), self.limit):
            if self.is_ours(source):
                yield source, request


@dataclass(frozen=True)
class Survey:
    """What the input holds for this worker, and what is left to do of it."""

    num_wanted: int  # traces, whatever the limit
    num_taken: int  # under the limit
    num_missing: int  # of these, not in the cache yet
    longest: int  # tokens that the engine must have room for
    num_rejected: int  # rows of the input that cannot be used
    num_input: int  # traces under the limit, all workers' together
    input_hash: str  # of these


def take_survey(job: Job, finished: Mapping[str, str]) -> Survey:
    """Render every row once: a bad row found after two days of capture is found too late.

    Args:
        job: Names input and cache.
        finished: trace_id -> source_hash of what the cache holds.

    Raises:
        SourceError: If the input holds nothing that can be used, a bad row where strict, or a
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
                f"{job.source.path}: trace {request.request_id!r} is in {shown(job.out)} already, "
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
            "%s: none of its %d traces has a chain of thought; if they should, see what "
            "cache-teacher preview makes of them",
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
    """Name columns that look like prompts and were left as the user's own."""
    over = [name for name in PROMPT_LIKE_COLUMNS if name in source.fields]
    if over:
        logger.info(
            "%s: left as fields of the traces: %s; --prompt-field names the column of the prompt",
            job.source.path, ", ".join(over),
        )  # fmt: skip


def _rejects_name(job: Job) -> str:
    """Workers with names of their own may have inputs of their own."""
    shared = job.is_whole or job.part is not None
    return "rejects.jsonl" if shared else f"rejects-{job.worker}.jsonl"
