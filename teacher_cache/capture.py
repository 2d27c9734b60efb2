"""The capture loop: requests -> teacher -> journal and shards, whatever the engine or the mode."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.engines import EngineError, Teacher, TeacherFacts, TeacherRequest, TeacherRows
from teacher_cache.format import (
    CacheHeader,
    CacheMismatchError,
    CachePath,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Manifest,
    Trace,
    keep_entries,
    open_store,
    read_manifest,
    seal_cache,
    shown,
)
from teacher_cache.progress import Progress
from teacher_cache.signals import Stopped, stop_signals
from teacher_cache.sources import Rejects, Source, SourceError, SourceTrace, find_sections
from teacher_cache.tokenizer import TeacherTokenizer

logger = logging.getLogger(__name__)

ONLY_WORKER = "w0"  # its name where there is one; others leave sealing to `cache-teacher seal`


@dataclass(frozen=True, kw_only=True)
class Job:
    """A capture, whichever way its traces come."""

    out: CachePath
    journal: Path | None  # where the cache's own folder, or the default for a URI, will not do
    worker: str
    limit: int | None  # traces; the rest of the input is only counted
    config: Mapping[str, Any]  # resolved, JSON; kept in the cache for the reader
    source: Source
    tokenizer: TeacherTokenizer
    requests: Callable[[SourceTrace], list[TeacherRequest]]
    header: Callable[[TeacherFacts], CacheHeader]
    start_teacher: Callable[[int], Teacher]  # given the longest trace, in tokens

    def wanted(self, rejects: Rejects) -> Iterator[tuple[SourceTrace, TeacherRequest]]:
        """Every request of the input, in its order; rows that have none go to `rejects`."""
        for item in self.source.read(rejects):
            for request in self.requests(item):
                yield item, request


@dataclass(frozen=True)
class Survey:
    """What the input holds, and what is left to do of it."""

    num_wanted: int  # traces, whatever the limit
    num_taken: int  # under the limit
    num_missing: int  # of these, not in the cache yet
    longest: int  # tokens that the engine must have room for
    num_rejected: int  # rows of the input that cannot be used


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did."""

    survey: Survey
    num_traces: int = 0  # captured now
    num_tokens: int = 0  # of these
    num_unfinished: int = 0  # of these, cut by length
    seconds: float = 0.0  # without the start of the engine
    sealed: bool = False
    stopped_by: int | None = None  # a signal's number


def capture(job: Job) -> CaptureReport:
    """Bring every trace of the input into the cache that is not there yet, and seal it.

    With a limit below the input the cache stays unsealed, to be gone on with.

    Raises:
        EngineError: If the teacher cannot be run.
        SourceError: If the input holds nothing that can be used, or a bad row where strict.
        CacheError: If the folder holds something else.
        OSError: If the cache cannot be written; what was finished before is kept.
    """
    manifest = read_manifest(job.out)
    if manifest is None:
        survey = _survey(job, {})
        with closing(job.start_teacher(survey.longest)) as teacher:
            header = job.header(teacher.facts)
            with _writer(job, header) as writer:
                return _run(job, survey, teacher, writer)
    # Refuse another capture's folder before the engine starts, and do without it where possible.
    header = job.header(_facts_of(manifest.header))
    with _writer(job, header) as writer:
        _require_same_parts(job, manifest)
        survey = _survey(job, writer.finished())
        if survey.num_missing == 0:
            return _finish(job, writer, CaptureReport(survey))
        if writer.sealed:
            raise CacheMismatchError(
                f"{writer.where} is sealed, and {survey.num_missing} of {survey.num_wanted} traces "
                "are not in it. Write them to another folder."
            )
        with closing(job.start_teacher(survey.longest)) as teacher:
            writer.require_header(job.header(teacher.facts))
            return _run(job, survey, teacher, writer)


def _writer(job: Job, header: CacheHeader) -> CacheWriter:
    return CacheWriter(job.out, header, config=job.config, worker=job.worker, journal=job.journal)


def _require_same_parts(job: Job, manifest: Manifest) -> None:
    """Refuse to mix captures that keep other parts of their traces; no header says which."""
    for name, default in (("slice", None), ("prompt_turns", "all")):
        before, now = (config.get(name, default) for config in (manifest.config, job.config))
        if before != now:
            raise CacheMismatchError(
                f"{shown(job.out)} holds another capture ({name}: {now}, not {before}). Write to "
                "another folder, or repeat that capture's settings."
            )


def _facts_of(header: CacheHeader) -> TeacherFacts:
    return TeacherFacts(
        engine=header.engine,
        engine_version=header.engine_version,
        dtype=header.dtype,
        head_dtype=header.head_dtype,
        vocab_size=header.vocab_size,
        max_model_len=0,  # not a fact of the cache
    )


def _survey(job: Job, finished: Mapping[str, str]) -> Survey:
    """Render every row once: a bad row found after two days of capture is found too late."""
    num_wanted = num_taken = num_missing = longest = 0
    rejects = Rejects()
    found: set[str] = set()
    for item, request in job.wanted(rejects):
        found.add(item.trace_id)
        num_wanted += 1
        longest = max(longest, len(request.token_ids) + request.max_new_tokens)
        known = finished.get(request.request_id)
        if known is not None and known != item.source_hash:
            raise SourceError(
                f"{job.source.path}: trace {request.request_id!r} is in {shown(job.out)} already, "
                "made from other content. Give the changed row a new id, or write to another "
                "folder."
            )
        if job.limit is None or num_taken < job.limit:
            num_taken += 1
            num_missing += known is None
    if num_wanted == 0:
        raise SourceError(
            f"{job.source.path}: expected at least one usable row, found none"
            + (f" ({rejects.most_frequent()})" if rejects.total else "")
        )
    job.source.say_missing_ids(found | rejects.ids)
    rejects.publish(open_store(job.out), _rejects_name(job.worker))
    return Survey(num_wanted, num_taken, num_missing, longest, rejects.total)


def _rejects_name(worker: str) -> str:
    """Workers that run apart may have inputs of their own."""
    return "rejects.jsonl" if worker == ONLY_WORKER else f"rejects-{worker}.jsonl"


def _run(job: Job, survey: Survey, teacher: Teacher, writer: CacheWriter) -> CaptureReport:
    in_flight: dict[str, SourceTrace] = {}

    def missing() -> Iterator[TeacherRequest]:
        for item, request in islice(job.wanted(Rejects()), survey.num_taken):
            if request.request_id not in writer.finished():
                in_flight[request.request_id] = item
                yield request

    num_unfinished = 0
    with Progress(survey.num_missing) as progress, stop_signals() as switch:
        try:
            for rows in teacher.run(missing()):
                with switch.held():
                    source = in_flight.pop(rows.request_id)
                    writer.append(finished_trace(rows, source, writer.header, job.tokenizer))
                    progress.add(len(rows.token_ids))
                    num_unfinished += rows.finish_reason == "length"
        except Stopped as stopped:
            logger.info("%s: stopping; what is finished is kept", stopped)
        except EngineError:
            if switch.signum is None:
                raise
            # Ctrl-C reaches the engine's own process too, and may end it before us.
    report = CaptureReport(
        survey,
        num_traces=progress.num_traces,
        num_tokens=progress.num_tokens,
        num_unfinished=num_unfinished,
        seconds=progress.seconds,
        stopped_by=switch.signum,
    )
    return report if report.stopped_by else _finish(job, writer, report)


def _finish(job: Job, writer: CacheWriter, report: CaptureReport) -> CaptureReport:
    writer.finish()
    # With other workers beside it, no worker can know that the cache is complete.
    complete = report.survey.num_taken == report.survey.num_wanted and job.worker == ONLY_WORKER
    if complete:
        seal_cache(job.out, journal=job.journal)
    return replace(report, sealed=complete)


def finished_trace(
    rows: TeacherRows, source: SourceTrace, header: CacheHeader, tokenizer: TeacherTokenizer
) -> FinishedTrace:
    """A teacher's rows as a trace: sections found, entries chosen, both counted."""
    ids = rows.token_ids
    bounds = source.bounds or find_sections(ids.tolist(), source.num_prompt, tokenizer)
    # Rows of prompt tokens that were not asked for may come all the same when scoring.
    first = rows.first_row if header.capture_prompt else max(rows.first_row, source.num_prompt)
    policy = KeepPolicy(header.top_k, header.mass)
    has_row = np.ones(len(ids), bool)
    has_row[:first] = False
    for start, end in source.without_rows:
        has_row[start:end] = False
    rows_kept = has_row[rows.first_row :]
    kept = keep_entries(rows.row_ids[rows_kept], rows.row_logprobs[rows_kept], policy)
    k, tail_logit = np.zeros(len(ids), np.uint8), np.zeros(len(ids), np.float32)
    k[has_row], tail_logit[has_row] = kept.k, kept.tail_logit
    trace = Trace(
        trace_id=rows.request_id,
        token_ids=ids,
        n_total=len(ids),
        cot_start=bounds[0],
        answer_start=bounds[1],
        k=k,
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=tail_logit,
        finish_reason=source.finish_reason or rows.finish_reason,
        fields=source.fields,
    )
    return FinishedTrace(trace, source.source_hash, kept.num_clamped_tails, kept.num_clamped_logits)
