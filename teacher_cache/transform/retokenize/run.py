"""`cache-teacher retokenize`: a teacher's cache in the tokens of a student with another tokenizer.

Made from the cache alone, without the teacher's weights and without a GPU: every distribution is
carried over byte by byte (see `distribution`). The result is an ordinary cache.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from teacher_cache.format import (
    Cache,
    CacheMismatchError,
    CacheWriter,
    compact_journals,
    open_cache,
    open_store,
    read_manifest,
    seal_cache,
    shown,
)
from teacher_cache.sources import Input, Rejects, SourceError
from teacher_cache.terminal.capture_progress import CaptureProgress
from teacher_cache.terminal.progress import Progress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals
from teacher_cache.transform.retokenize.certificate import overall
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.convert import Rejected, Task
from teacher_cache.transform.retokenize.loading import student_header
from teacher_cache.transform.retokenize.prompts import CachedPrompts, PromptRows, Prompts
from teacher_cache.transform.retokenize.workers import Workers

logger = logging.getLogger(__name__)

_CHUNK_ENTRIES = 400_000  # converted at once: 100 MB of memory, and arrays that fit a CPU cache


@dataclass(frozen=True)
class RetokenizeReport:
    """Report of a run.

    Attributes:
        num_traces: Traces written by this run.
        num_tokens: Tokens of these traces.
        num_present: Traces that were already there.
        rejects: Traces and rows left out.
        figures: Combined certificates of all traces; see `certificate.overall`.
        seconds: Duration of the work, without the start.
        stopped_by: Number of the signal that stopped the run.
    """

    num_traces: int
    num_tokens: int
    num_present: int
    rejects: Rejects
    figures: Mapping[str, float] | None
    seconds: float
    stopped_by: int | None = None


def retokenize(config: RetokenizeConfig) -> RetokenizeReport:
    """Write a cache in the student's tokens, and seal it; run again to resume.

    Raises:
        CacheError: If the source is damaged or mismatched, or `out` holds something else.
        UnsupportedTokenizerError: If one of the tokenizers is of a kind that cannot be converted
            to or from.
        SourceError: If no trace can be carried over.
        OSError: If the cache cannot be written; finished traces are kept.
    """
    source = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
    if source.header.lead_spans is not None:
        raise CacheMismatchError(
            f"{source.path}: was truncated to {source.header.held_part}, whose lengths are of the "
            "teacher's tokens. Retokenize the cache that it was made from, and truncate the result"
        )
    if not source.header.has_tails:
        raise CacheMismatchError(
            f"{source.path}: it was imported from rows that do not tell the probability outside "
            "their entries, which carrying distributions over needs. Train a student with the "
            "teacher's tokenizer on it (--tail renormalise)"
        )
    with Progress("loading the student's tokenizer"):
        header = student_header(config, source)
    origin = {"retokenized_from": source.fingerprint}
    manifest = read_manifest(config.out)
    if manifest is not None and manifest.seal is None:
        compact_journals(config.out, manifest.header, journal=config.journal)
    with CacheWriter(
        config.out, header, config={**_as_json(config), **origin}, journal=config.journal
    ) as writer:
        if writer.manifest.config.get("retokenized_from") != source.fingerprint:
            raise CacheMismatchError(
                f"{writer.where}: was made from another cache; write to another folder"
            )
        report = _run(config, source, writer)
        if report.stopped_by is None and not writer.sealed:
            report.rejects.publish(open_store(config.out), "rejects.jsonl")
            if not writer.finished():
                raise SourceError(
                    f"{source.path}: no trace can be carried over: {report.rejects.most_frequent()}"
                )
            writer.finish()
    if report.stopped_by is None:
        seal_cache(config.out, journal=config.journal, known=writer.finished())
        made = open_cache(config.out)
        report = replace(report, figures=overall(made.infos))
    return report


def _as_json(config: RetokenizeConfig) -> dict[str, object]:
    values = {**asdict(config), "cache": shown(config.cache), "out": shown(config.out)}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _run(config: RetokenizeConfig, source: Cache, writer: CacheWriter) -> RetokenizeReport:
    rejects = Rejects()
    names = set(source.catalog.trace_ids(source.catalog.counted))
    missing = names - writer.finished().keys()
    num_present = len(names) - len(missing)
    if not missing or writer.sealed:
        return RetokenizeReport(0, 0, num_present, rejects, None, 0.0)
    stopped_by = None
    with ExitStack() as stack:
        prompts: Prompts = CachedPrompts(source)
        if config.rows is not None:
            given = Input(config.rows, config.dataset_config, config.split)
            prompts = stack.enter_context(PromptRows(given, config.id_field, missing, rejects))
        convert = stack.enter_context(Workers(config, source.header))
        progress = stack.enter_context(CaptureProgress(len(missing), doing="carried over"))
        switch = stack.enter_context(stop_signals())
        try:
            for result in convert(_chunks(source, missing, prompts)):
                with switch.held():
                    if isinstance(result, Rejected):
                        rejects.add(source.path, 0, result.trace_id, result.error)
                        progress.leave_out()
                        continue
                    writer.append(result)
                    trace = result.trace
                    progress.add(trace.n_total, cut_by_length=trace.finish_reason == "length")
        except Stopped as stopped:
            stopped_by = stopped.signum
            logger.info("%s: stopping; finished traces are kept", stopped)
    return RetokenizeReport(
        progress.num_traces,
        progress.num_tokens,
        num_present,
        rejects,
        None,
        progress.seconds,
        stopped_by,
    )


def _chunks(source: Cache, missing: set[str], prompts: Prompts) -> Iterator[list[Task]]:
    """Yield traces to convert together, shard by shard."""
    rows_of: dict[int, list[int]] = {}
    ids = source.catalog.trace_ids(source.catalog.counted)
    for (shard, row), trace_id in zip(source.traces, ids, strict=True):
        if trace_id in missing:
            rows_of.setdefault(shard, []).append(row)
    for shard, rows in rows_of.items():
        infos = source.shards[shard].traces
        traces = source.read(shard, {row: source.num_held(infos[row]) for row in rows})
        chunk: list[Task] = []
        num_entries = 0
        for row, trace in traces.items():
            task = Task(trace, infos[row].source_hash, prompts.row_of(trace.trace_id))
            if chunk and num_entries + trace.num_entries > _CHUNK_ENTRIES:
                yield chunk
                chunk, num_entries = [], 0
            chunk.append(task)
            num_entries += trace.num_entries
        yield chunk
