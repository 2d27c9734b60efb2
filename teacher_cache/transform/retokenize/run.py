"""`cache-teacher retokenize`: a teacher's cache in the tokens of a student with another tokenizer.

Made from the cache alone, without the teacher's weights and without a GPU: every distribution is
carried over byte by byte (see `distribution`). The result is an ordinary cache.
"""

import itertools
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from teacher_cache.format import (
    Cache,
    CacheError,
    CacheHeader,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    compact_journals,
    open_cache,
    open_store,
    read_manifest,
    seal_cache,
    shown,
)
from teacher_cache.sources import Input, PromptRenderer, Rejects, RowColumns, SourceError
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.sources.turn_layout import GivenMarks
from teacher_cache.terminal.capture_progress import CaptureProgress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.certificate import overall
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.convert import Converter, Rejected, Task
from teacher_cache.transform.retokenize.prompts import PromptRows, Prompts
from teacher_cache.transform.retokenize.rows import MAX_VOCABULARY
from teacher_cache.transform.retokenize.vocabularies import share_vocabularies

logger = logging.getLogger(__name__)

_CHUNK_ENTRIES = 400_000  # converted at once: 100 MB at work, and arrays that a cache still holds
_NO_LIMIT = 1 << 31  # of a prompt: the response is given, whatever the student's context


@dataclass(frozen=True)
class RetokenizeReport:
    """What was done.

    Attributes:
        num_traces: Written now.
        num_tokens: Of these.
        num_present: That were there already.
        rejects: Traces and rows that were left out.
        figures: The certificates of all traces in one; see `certificate.overall`.
        seconds: Of work, without the start.
        stopped_by: A signal's number.
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
        CacheError: If the source is not what it says, or `out` holds something else.
        UnsupportedTokenizerError: If one of the tokenizers is of a kind that cannot be carried
            over.
        SourceError: If no trace can be carried over.
        OSError: If the cache cannot be written; what was finished before is kept.
    """
    source = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
    header = _student_header(config, source)
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
            if not writer.finished():
                raise SourceError(
                    f"{source.path}: no trace can be carried over: {report.rejects.most_frequent()}"
                )
            writer.finish()
    if report.stopped_by is None:
        seal_cache(config.out, journal=config.journal)
        report.rejects.publish(open_store(config.out), "rejects.jsonl")
        made = open_cache(config.out)
        infos = (made.shards[shard].traces[row] for shard, row in made.traces)
        report = replace(report, figures=overall(infos))
    return report


def _student_files(config: RetokenizeConfig) -> ModelFiles:
    return ModelFiles(config.student, config.student_revision)


def _student_chat(config: RetokenizeConfig) -> TeacherTokenizer:
    marks = None
    if config.think_open is not None and config.think_close is not None:
        opener, joint = (m.replace("\\n", "\n") for m in (config.think_open, config.think_close))
        marks = GivenMarks(opener, joint)
    return TeacherTokenizer(_student_files(config), config.template_arg, marks)


def _student_header(config: RetokenizeConfig, source: Cache) -> CacheHeader:
    """The source's header, with all that is said of tokens the student's."""
    files, chat = _student_files(config), _student_chat(config)
    before = source.header
    if before.derived is not None:
        raise CacheMismatchError(
            f"{source.path}: was carried over from another tokenizer itself; start from the cache "
            f"that it was made from ({before.derived.get('fingerprint')})"
        )
    layout = chat.layout()
    mark_ids = (
        ((), ())
        if layout.marks is None
        else tuple(tuple(chat.encode(mark)) for mark in (layout.marks.open, layout.marks.close))
    )
    return replace(
        before,
        vocab_size=max(files.vocab_size(), chat.size),
        tokenizer_size=chat.size,
        tokenizer_fingerprint=chat.fingerprint,
        chat_template_hash=chat.template_hash,
        think_open_ids=mark_ids[0],
        think_close_ids=mark_ids[1],
        terminal_token_ids=chat.terminal_ids,
        capture_prompt=False,
        derived={
            "fingerprint": source.fingerprint,
            "tokenizer_fingerprint": before.tokenizer_fingerprint,
            "vocab_size": before.vocab_size,
            "student": files.name,
        },
    )


def _as_json(config: RetokenizeConfig) -> dict[str, object]:
    values = {**asdict(config), "cache": shown(config.cache), "out": shown(config.out)}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def make_converter(config: RetokenizeConfig, source: CacheHeader) -> Converter:
    """Load both tokenizers.

    Args:
        config: Names them.
        source: Header of the teacher's cache.

    Raises:
        CacheMismatchError: If the teacher's tokenizer is not the cache's.
        UnsupportedTokenizerError: If one of them cannot be carried over.
    """
    where = config.teacher or source.teacher
    files = ModelFiles(where, source.teacher_revision if config.teacher is None else None)
    own = TeacherTokenizer(files, {})
    if own.fingerprint != source.tokenizer_fingerprint:
        raise CacheMismatchError(
            f"teacher {where!r}: has another tokenizer than the cache was captured with; name the "
            "folder of the right one with --teacher"
        )
    teacher = ByteTokenizer(own.definition, f"teacher {where!r}")
    chat = _student_chat(config)
    student = ByteTokenizer(chat.definition, f"student {config.student!r}")
    vocab_size = max(_student_files(config).vocab_size(), chat.size)
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"student: at most {MAX_VOCABULARY:,} ids, got {vocab_size:,}")
    columns = RowColumns(
        id_field=config.id_field,
        prompt_field=config.prompt_field,
        drop_system=config.drop_system,
        apply_chat_template=config.apply_chat_template,
    )
    render = PromptRenderer(chat, _NO_LIMIT, vocab_size, columns)
    words = share_vocabularies(teacher, source, student, chat)
    return Converter(source, teacher, student, words, chat, render)


def _run(config: RetokenizeConfig, source: Cache, writer: CacheWriter) -> RetokenizeReport:
    rejects = Rejects()
    names = {source.shards[shard].traces[row].trace_id for shard, row in source.traces}
    missing = names - writer.finished().keys()
    num_present = len(names) - len(missing)
    if not missing or writer.sealed:
        return RetokenizeReport(0, 0, num_present, rejects, None, 0.0)
    given = Input(config.rows, config.dataset_config, config.split)
    stopped_by = None
    with ExitStack() as stack:
        prompts = stack.enter_context(PromptRows(given, config.id_field, missing, rejects))
        convert = stack.enter_context(_Workers(config, source.header))
        progress = stack.enter_context(CaptureProgress(len(missing), doing="carried over"))
        switch = stack.enter_context(stop_signals())
        try:
            for result in convert(_chunks(source, missing, prompts)):
                with switch.held():
                    if isinstance(result, Rejected):
                        rejects.add(source.path, 0, result.trace_id, result.error)
                        continue
                    writer.append(result)
                    trace = result.trace
                    progress.add(trace.n_total, cut_by_length=trace.finish_reason == "length")
        except Stopped as stopped:
            stopped_by = stopped.signum
            logger.info("%s: stopping; what is finished is kept", stopped)
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
    """Traces to convert together, shard by shard."""
    rows_of: dict[int, list[int]] = {}
    for shard, row in source.traces:
        if source.shards[shard].traces[row].trace_id in missing:
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


class _Workers:
    """Converts chunks in other processes, or in this one where there is one core."""

    def __init__(self, config: RetokenizeConfig, source: CacheHeader) -> None:
        """Start them; this process reads the tokenizers too, so that errors are said plainly."""
        self._num = config.processes or len(os.sched_getaffinity(0))
        self._convert = make_converter(config, source)
        self._pool: ProcessPoolExecutor | None = None
        if self._num > 1:
            self._pool = ProcessPoolExecutor(
                self._num,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(config, source),
            )

    def __enter__(self) -> "Callable[[Iterator[list[Task]]], Iterator[FinishedTrace | Rejected]]":
        return self._converted

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _converted(self, chunks: Iterator[list[Task]]) -> Iterator[FinishedTrace | Rejected]:
        if self._pool is None:
            for chunk in chunks:
                yield from self._convert(chunk)
            return
        waiting: deque[Future[list[FinishedTrace | Rejected]]] = deque()
        try:
            for chunk in itertools.chain(chunks, [None] * (2 * self._num)):
                if chunk is not None:
                    waiting.append(self._pool.submit(_convert, chunk))
                if waiting and (chunk is None or len(waiting) >= 2 * self._num):
                    yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise CacheError(
                "a process that was converting traces has died, probably for lack of memory; what "
                "is finished is kept. Run again with fewer --processes"
            ) from error


_converter: Converter | None = None  # of this process


def _start_worker(config: RetokenizeConfig, source: CacheHeader) -> None:
    global _converter  # noqa: PLW0603  # an initializer has no other way to leave something behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    _converter = make_converter(config, source)


def _convert(tasks: list[Task]) -> list[FinishedTrace | Rejected]:
    if _converter is None:
        raise RuntimeError("the process was not started by _start_worker")
    return _converter(tasks)
