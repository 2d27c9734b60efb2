"""`cache-teacher import`: rows that other programs wrote, as a sealed cache.

What the rows mean (where they stand, whether they are normalised) is found on the first traces,
before anything is written, and is the same for all.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import teacher_cache
from teacher_cache.format import (
    CacheHeader,
    CacheWriter,
    KeepPolicy,
    compact_journals,
    open_store,
    read_manifest,
    seal_cache,
    shown,
)
from teacher_cache.sources import (
    BadRow,
    Input,
    Reason,
    Rejects,
    SourceError,
    TraceRenderer,
    given_id,
    row_values,
)
from teacher_cache.sources.row import Row
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.sources.turn_layout import GivenMarks
from teacher_cache.terminal.capture_progress import CaptureProgress
from teacher_cache.terminal.progress import Progress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals
from teacher_cache.transform.importing.axolotl import AxolotlRows, is_prepared
from teacher_cache.transform.importing.columns import DISTILLKIT_PLAIN, Columns
from teacher_cache.transform.importing.configs import ImportConfig
from teacher_cache.transform.importing.convert import (
    Converter,
    Counts,
    Meaning,
    source_hash,
)
from teacher_cache.transform.importing.distillkit import CONFIG_NAME, DistillKit
from teacher_cache.transform.importing.foreign import ForeignTrace
from teacher_cache.transform.importing.meaning import Parse, found_meaning, parsed, values_of
from teacher_cache.transform.importing.responses import server_traces, trl_traces

logger = logging.getLogger(__name__)

_NO_LIMIT = 1 << 31  # on a trace: it exists, whatever the teacher's context


@dataclass(frozen=True)
class ImportReport:
    """Report of an import.

    Attributes:
        num_traces: Traces written by this run.
        num_present: Traces that were already there.
        counts: What became of their tokens.
        meaning: What the rows were found to be.
        rejects: Rows left out.
        stopped_by: Number of the signal that stopped the run.
    """

    num_traces: int
    num_present: int
    counts: Counts
    meaning: Meaning
    rejects: Rejects
    stopped_by: int | None = None


def import_cache(config: ImportConfig) -> ImportReport:
    """Write the rows as a cache, and seal it; run again to resume.

    Raises:
        SourceError: If no row can be used, the rows fit their tokens nowhere, they do not tell
            their tails under `--tail known`, or a row is bad under `strict`.
        EngineError: If the teacher's tokenizer cannot be loaded.
        CacheError: If `out` holds something else.
        OSError: If the cache cannot be written; finished traces are kept.
    """
    rows = Input(config.rows, config.dataset_config, config.split)
    files = ModelFiles(config.model, config.revision, config.trust_remote_code)
    with Progress("loading the tokenizer"):
        tokenizer = TeacherTokenizer(files, config.template_arg, _marks(config))
    parse = _parser(config, rows, tokenizer, files.vocab_size())
    with Progress("comparing the first rows with their tokens"):
        meaning = found_meaning(config, rows, parse)
    convert = Converter(
        tokenizer,
        files.vocab_size(),
        # Rounded sums reach 1 before the last entry.
        KeepPolicy(config.top_k, config.mass if config.mass < 1 else math.inf),
        meaning,
        config.id_field,
        tokenizer.layout().marks,
    )
    manifest = read_manifest(config.out)
    if manifest is not None and manifest.seal is None:
        compact_journals(config.out, manifest.header, journal=config.journal)
    header = _header(config, files, tokenizer, meaning)
    with CacheWriter(config.out, header, config=_as_json(config), journal=config.journal) as writer:
        report = _run(config, rows, parse, convert, writer)
        if report.stopped_by is None:
            report.rejects.publish(open_store(config.out), "rejects.jsonl")
            if not writer.finished():
                raise SourceError(
                    f"{rows.path}: no row can be imported: {report.rejects.most_frequent()}"
                )
            writer.finish()
    if report.stopped_by is None:
        seal_cache(config.out, journal=config.journal, known=writer.finished())
    return report


def _marks(config: ImportConfig) -> GivenMarks | None:
    if config.think_open is None or config.think_close is None:
        return None
    opener, joint = (m.replace("\\n", "\n") for m in (config.think_open, config.think_close))
    return GivenMarks(opener, joint)


def _parser(
    config: ImportConfig, rows: Input, tokenizer: TeacherTokenizer, vocab_size: int
) -> Parse:
    """Reader of the rows' format."""
    match config.format:
        case "columns":
            return Columns(
                config.token_ids_column or "token_ids",
                config.top_ids_column or "top_ids",
                config.values_column or "top_logprobs",
                config.log_normaliser_column,
                config.num_prompt_column,
            )
        case "axolotl":
            name = config.values_column or "logprobs"
            kinds = (is_prepared(row) for row in values_of(rows) if _is_axolotls(row, name))
            prepared = next(kinds, False)
            if config.row_shift is not None and not prepared:
                raise SourceError(
                    f"{rows.path}: --row-shift: raw rows of Axolotl begin with the response, which "
                    "the chat template places; leave it out"
                )
            render = TraceRenderer(tokenizer, _NO_LIMIT, vocab_size, config.columns)
            return AxolotlRows(render, prepared, name)
        case "distillkit":
            first = next(values_of(rows), {})
            if "top_values" in first:
                return DISTILLKIT_PLAIN
            folder = rows.path if rows.path.is_dir() else rows.path.parent
            return DistillKit.read(config.compression_config or folder / CONFIG_NAME)
        case "server":
            return server_traces
        case _:
            return trl_traces


def _is_axolotls(row: dict[str, Any], logprobs: str) -> bool:
    return is_prepared(row) or logprobs in row


def _header(
    config: ImportConfig, files: ModelFiles, tokenizer: TeacherTokenizer, meaning: Meaning
) -> CacheHeader:
    layout = tokenizer.layout()
    marks = ("", "") if layout.marks is None else (layout.marks.open, layout.marks.close)
    return CacheHeader(
        mode="score",
        teacher=files.name,
        teacher_revision=config.revision,
        teacher_fingerprint=files.weights_fingerprint(),
        engine="import",
        engine_version=teacher_cache.__version__,
        dtype="unknown",
        head_dtype="unknown",
        vocab_size=files.vocab_size(),
        tokenizer_size=tokenizer.size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        chat_template_hash=tokenizer.template_hash,
        think_open_ids=tuple(tokenizer.encode(marks[0])),
        think_close_ids=tuple(tokenizer.encode(marks[1])),
        terminal_token_ids=tokenizer.terminal_ids,
        sampling=None,
        top_k=config.top_k,
        mass=config.mass,
        capture_prompt=config.format in ("columns", "distillkit", "server"),
        num_bands=config.num_bands,
        chat_template=tokenizer.template.text,
        chat_template_args=tokenizer.template.arguments or None,
        special_tokens=tokenizer.special_tokens or None,
        added_tokens=tokenizer.added_tokens or None,
        turn_layout=layout.to_json(),
        imported={
            "format": config.format,
            "row_shift": meaning.shift,
            "tail": "known" if meaning.has_tails else "unknown",
        },
    )


def _as_json(config: ImportConfig) -> dict[str, object]:
    values = {**asdict(config), "out": shown(config.out)}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _run(
    config: ImportConfig, rows: Input, parse: Parse, convert: Converter, writer: CacheWriter
) -> ImportReport:
    report = ImportReport(0, 0, convert.counts, convert.meaning, Rejects())
    seen: set[str] = set()
    num_present, stopped_by = 0, None
    with CaptureProgress(None, doing="imported") as progress, stop_signals() as switch:
        try:
            for row, values, foreign in _foreign_traces(config, rows, parse, report.rejects):
                with switch.held():
                    try:
                        name = convert.trace_id(foreign, values)
                        if name in seen:
                            raise BadRow(Reason.DUPLICATE_ID, f"id {name!r} already occurs")
                        known = writer.finished().get(name)
                        if known is None:
                            finished = convert(foreign, values)
                            writer.append(finished)
                            progress.add(len(foreign.token_ids))
                        else:
                            _require_same(config, name, known, foreign)
                            num_present += 1
                        seen.add(name)
                    except BadRow as error:
                        _reject(config, row, values, error, report.rejects)
        except Stopped as stopped:
            stopped_by = stopped.signum
            logger.info("%s: stopping; finished traces are kept", stopped)
    return replace(
        report, num_traces=progress.num_traces, num_present=num_present, stopped_by=stopped_by
    )


def _foreign_traces(
    config: ImportConfig, rows: Input, parse: Parse, rejects: Rejects
) -> Iterator[tuple[Row, dict[str, Any], ForeignTrace]]:
    for row in rows:
        values: dict[str, Any] = {}
        try:
            values = row_values(row)
            traces = parsed(parse, values)
        except BadRow as error:
            _reject(config, row, values, error, rejects)
            continue
        for trace in traces:
            yield row, values, trace


def _reject(
    config: ImportConfig, row: Row, values: dict[str, Any], error: BadRow, rejects: Rejects
) -> None:
    if config.strict:
        raise SourceError(
            f"{row.file}:{row.number}: {error} [{error.reason}]. Fix the row, or leave out "
            "--strict to skip such rows."
        ) from error
    try:
        name = given_id(values, config.id_field)
    except BadRow:
        name = None  # the id itself is what is wrong
    rejects.add(row.file, row.number, name, error)


def _require_same(config: ImportConfig, name: str, known: str, foreign: ForeignTrace) -> None:
    if known != source_hash(foreign):
        raise SourceError(
            f"{config.rows}: trace {name!r} is already in {shown(config.out)}, made from other "
            "content. Give the changed row a new id, or write to another folder"
        )
