"""A capture from the first check of its folder to the seal, for any engine and mode."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from teacher_cache.capture.job import Job
from teacher_cache.capture.noise import Repeats
from teacher_cache.capture.survey import Survey, take_survey
from teacher_cache.capture.survey_table import remove_survey_tables
from teacher_cache.capture.worker_loop import Done, run_requests
from teacher_cache.engines import EngineError, EngineStartError, Teacher, TeacherFacts
from teacher_cache.engines.start import is_of_quantised_head
from teacher_cache.format import (
    CacheHeader,
    CacheMismatchError,
    CacheWriter,
    InputShare,
    Manifest,
    ShareRecord,
    compact_journals,
    open_store,
    publish_share,
    read_manifest,
    read_shares,
    seal_cache,
    shares_to_come,
    shown,
)
from teacher_cache.terminal.capture_progress import CaptureProgress
from teacher_cache.terminal.messages import last_error_said, others_into_log
from teacher_cache.terminal.progress import Progress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureReport:
    """Report of a capture."""

    survey: Survey
    num_traces: int = 0  # captured by this run
    num_tokens: int = 0  # of these
    num_unfinished: int = 0  # of these, cut off by length
    start_s: float = 0.0  # until the teacher was ready
    seconds: float = 0.0  # without the teacher's start
    sealed: bool = False
    stopped_by: int | None = None  # a signal's number
    part: InputShare | None = None  # of the input, if several workers share it
    shares_to_come: tuple[InputShare, ...] = ()  # those that have not finished this input


class Crew(Protocol):
    """Interface for whatever runs a job's requests and keeps their traces."""

    facts: TeacherFacts

    def run(
        self,
        writer: CacheWriter,
        note: Callable[[Done], None],
        hold: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Run every request missing from the cache, as `run_requests`."""
        ...

    def close(self) -> None:
        """End engines and processes."""
        ...


class _QuantisedHeadError(EngineError):
    """The model's head cannot have float32 logits."""


def started(doing: str, start: Callable[..., Teacher]) -> Teacher:
    """Start a teacher, with its output in the log file.

    Args:
        doing: For the bar.
        start: Starts it; takes the `head_dtype` of its logits. A quantised head cannot have
            float32, and is started again with the model's own, which the cache's header says.

    Raises:
        EngineError: If it does not start; the message has the last error of its process.
    """
    with Progress(doing, hint="small models: 20 to 60 s"), others_into_log():
        try:
            return _started(start, "float32")
        except _QuantisedHeadError:
            logger.warning(
                "the teacher's head is quantised, so that its logits cannot be float32: starting "
                "the engine again, with those that the model has (`head_dtype` in the cache)"
            )
            return _started(start, "model")


def _started(start: Callable[..., Teacher], head_dtype: str) -> Teacher:
    try:
        return start(head_dtype=head_dtype)
    except EngineStartError as error:
        cause = last_error_said()
        kind = _QuantisedHeadError if is_of_quantised_head(cause) else EngineError
        raise kind(": ".join(filter(None, (str(error), cause)))) from error


class Alone:
    """The crew of a plain job: one teacher, in this process."""

    def __init__(self, job: Job, longest: int) -> None:
        self._job = job
        engine, model = (job.config.get(name, "the teacher") for name in ("engine", "model"))
        doing = f"starting {engine} for {Path(str(model)).name}"  # a bar has 80 columns
        self._teacher = started(doing, partial(job.start_teacher, longest))
        self.facts = self._teacher.facts

    def run(
        self,
        writer: CacheWriter,
        note: Callable[[Done], None],
        hold: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Run the requests one window after the other."""
        job, repeats = self._job, Repeats()
        run_requests(job.work(), self._teacher, writer, job.tokenizer, note, hold, repeats)
        noise = repeats.measure(self._teacher)
        if noise is not None:
            writer.keep_noise(noise)

    def close(self) -> None:
        """Close the teacher."""
        with Progress("ending the engine"):
            self._teacher.close()


def capture(job: Job, start_crew: Callable[[Job, int], Crew] = Alone) -> CaptureReport:
    """Capture every trace of the input that is missing from the cache, and seal it.

    With a limit below the input the cache stays unsealed, to be continued later, and so it does if
    the job is one of several workers.

    Raises:
        EngineError: If the teacher cannot run.
        SourceError: If the input has nothing usable, or a bad row under `strict`.
        CacheError: If the folder holds a different capture.
        OSError: If the cache cannot be written; finished traces are kept.
    """
    manifest = read_manifest(job.out)
    if manifest is None:
        survey = take_survey(job, {})
        if survey.num_missing == 0:  # no row is this worker's
            return _with_parts(job, CaptureReport(survey))
        job = job.without(survey.done, survey.num_done)
        began_s = time.monotonic()
        with closing(start_crew(job, survey.longest)) as crew:
            start_s = time.monotonic() - began_s
            header = job.header(crew.facts)
            with _writer(job, header) as writer:
                return replace(_run(job, survey, crew, writer), start_s=start_s)
    # Refuse another capture's folder before the engine starts, and avoid starting it if possible.
    header = job.header(_facts_of(manifest.header))
    if job.on_cluster and manifest.seal is None:
        compact_journals(job.out, manifest.header, journal=job.journal)
    with _writer(job, header) as writer:
        _require_same_parts(job, manifest)
        survey = take_survey(job, writer.finished())
        if survey.num_missing == 0:
            return _finish(job, writer, CaptureReport(survey))
        if writer.sealed:
            remove_survey_tables(job.out)
            raise CacheMismatchError(
                f"{writer.where} is sealed, and {survey.num_missing} of {survey.num_wanted} traces "
                "are not in it. Write them to another folder."
            )
        job = job.without(survey.done, survey.num_done)
        began_s = time.monotonic()
        with closing(start_crew(job, survey.longest)) as crew:
            start_s = time.monotonic() - began_s
            writer.require_header(job.header(crew.facts))
            return replace(_run(job, survey, crew, writer), start_s=start_s)


def _writer(job: Job, header: CacheHeader) -> CacheWriter:
    return CacheWriter(job.out, header, config=job.config, worker=job.worker, journal=job.journal)


def _require_same_parts(job: Job, manifest: Manifest) -> None:
    """Refuse to mix captures that keep different parts of traces, which no header records."""
    for name, default in (("slice", None), ("prompt_turns", "all"), ("assistant_turns", "last")):
        before, now = (config.get(name, default) for config in (manifest.config, job.config))
        if before != now:
            raise CacheMismatchError(
                f"{shown(job.out)} holds another capture ({name}: {before} there, {now} now). "
                "Write to another folder, or repeat that capture's settings."
            )


def _facts_of(header: CacheHeader) -> TeacherFacts:
    return TeacherFacts(
        engine=header.engine,
        engine_version=header.engine_version,
        dtype=header.dtype,
        head_dtype=header.head_dtype,
        vocab_size=header.vocab_size,
        max_model_len=0,  # not a fact of the cache
        settings=header.teacher_settings or {},
    )


def _run(job: Job, survey: Survey, crew: Crew, writer: CacheWriter) -> CaptureReport:
    if job.part is not None:
        publish_share(open_store(job.out), job.part, _record(survey, finished=False))
    with CaptureProgress(survey.num_missing) as progress, stop_signals() as switch:
        num_thoughts = num_empty = 0

        def note(done: Done) -> None:
            nonlocal num_thoughts, num_empty
            num_thoughts += done.has_thought
            num_empty += done.is_empty
            progress.add(done.num_tokens, cut_by_length=done.cut_by_length)

        try:
            crew.run(writer, note, switch.held)
        except Stopped as stopped:
            logger.info("%s: stopping; finished traces are kept", stopped)
        except EngineError:
            if switch.signum is None:
                raise
            # Ctrl-C also reaches the engine's own process, and may end it before us.
    report = CaptureReport(
        survey,
        num_traces=progress.num_traces,
        num_tokens=progress.num_tokens,
        num_unfinished=progress.num_unfinished,
        seconds=progress.seconds,
        stopped_by=switch.signum,
    )
    if num_empty:
        logger.warning(
            "%s: %d of the %d traces captured now hold no distribution, so that nothing is learned "
            "from them: a lead span of %g ends inside their prompts. Capture with a longer "
            "--lead-span, or with --capture-prompt",
            shown(job.out), num_empty, report.num_traces, writer.header.max_lead_span,
        )  # fmt: skip
    if report.num_traces and not num_thoughts and writer.header.mode == "generate":
        # Given traces were looked at before the engine started.
        logger.warning(
            "%s: none of the %d traces captured now has a chain of thought; if the teacher should "
            "write one, run cache-teacher preview on the prompts: its chat template may leave "
            "thinking off, or its marks are not known",
            shown(job.out), report.num_traces,
        )  # fmt: skip
    return report if report.stopped_by else _finish(job, writer, report)


def _finish(job: Job, writer: CacheWriter, report: CaptureReport) -> CaptureReport:
    """Compact and seal; if either is interrupted, the next run does it."""
    with stop_signals() as switch:
        try:
            return _sealed(job, writer, report)
        except Stopped as stopped:
            logger.info("%s: stopping; every trace is kept, but the cache is not sealed", stopped)
            return replace(report, stopped_by=switch.signum)


def _sealed(job: Job, writer: CacheWriter, report: CaptureReport) -> CaptureReport:
    survey = report.survey
    with Progress("writing the last shard"):
        writer.finish()
    # Beside other workers, no worker can know that the cache is complete.
    complete = survey.num_taken == survey.num_wanted and job.is_whole
    if complete:
        with Progress("sealed", unit="shards") as progress:
            seal_cache(
                job.out,
                journal=job.journal,
                allow_missing=True,
                known=writer.finished(),
                on_record=lambda done, total: progress.set(done, total=total),
            )
    if complete or writer.sealed:
        remove_survey_tables(job.out)
    return _with_parts(job, replace(report, sealed=complete))


def _with_parts(job: Job, report: CaptureReport) -> CaptureReport:
    """Record that this worker's part is done, and return which are not."""
    if job.part is None:
        return report
    store, record = open_store(job.out), _record(report.survey, finished=True)
    publish_share(store, job.part, record)
    to_come = shares_to_come(read_shares(store), job.part.count, record.input_hash)
    return replace(report, part=job.part, shares_to_come=tuple(to_come))


def _record(survey: Survey, *, finished: bool) -> ShareRecord:
    return ShareRecord(survey.input_hash, survey.num_input, survey.num_taken, finished)
