"""`cache-teacher import`: rows that other programs wrote, as a sealed cache.

What the rows mean (where they stand, whether they are normalised) is found on the first traces,
before anything is written, and is the same for all.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

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
from teacher_cache.terminal.stop_signals import Stopped, stop_signals
from teacher_cache.transform.importing.axolotl import AxolotlRows, is_prepared
from teacher_cache.transform.importing.columns import DISTILLKIT_PLAIN, Columns
from teacher_cache.transform.importing.configs import ImportConfig
from teacher_cache.transform.importing.convert import (
    EXACT_EXCESS,
    FITTED_EXCESS,
    Converter,
    Counts,
    Meaning,
    log_sums,
    source_hash,
)
from teacher_cache.transform.importing.distillkit import CONFIG_NAME, DistillKit
from teacher_cache.transform.importing.foreign import ForeignTrace
from teacher_cache.transform.importing.placing import found_shift
from teacher_cache.transform.importing.responses import server_traces, trl_traces

logger = logging.getLogger(__name__)

Parse = Callable[[Mapping[str, Any]], list[ForeignTrace]]
_NUM_LOOKED_AT = 32  # first traces, which tell what the rows mean
# Rows whose sums are all this close to 1, though none of them is sure of its token, were divided by
# their sums: of a real distribution something is left over.
_RENORMALISED = 1e-5
_FEWEST_UNSURE, _SURE = 16, 0.9
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
    tokenizer = TeacherTokenizer(files, config.template_arg, _marks(config))
    parse = _parser(config, rows, tokenizer, files.vocab_size())
    meaning = _meaning(config, rows, parse)
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
            render = TraceRenderer(tokenizer, _NO_LIMIT, vocab_size, config.columns)
            return AxolotlRows(render, config.values_column or "logprobs")
        case "distillkit":
            first = next(_values_of(rows), {})
            if "top_values" in first:
                return DISTILLKIT_PLAIN
            folder = rows.path if rows.path.is_dir() else rows.path.parent
            return DistillKit.read(config.compression_config or folder / CONFIG_NAME)
        case "server":
            return server_traces
        case _:
            return trl_traces


def _values_of(rows: Input) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            yield row_values(row)
        except BadRow:
            continue  # counted when the rows are imported


def _meaning(config: ImportConfig, rows: Input, parse: Parse) -> Meaning:
    """Find on the first traces where rows stand and whether they tell their tails."""
    traces: list[ForeignTrace] = []
    last: BadRow | None = None
    has_tails = config.tail == "known"
    for values in islice(_values_of(rows), 2 * _NUM_LOOKED_AT):
        try:
            traces += parse(values)
        except BadRow as error:
            last = error
        if has_tails and config.format == "axolotl" and is_prepared(values):
            raise SourceError(
                f"{rows.path}: `axolotl preprocess` divides every row by its sum, so the "
                "probability outside the entries is lost. Import the rows it was given, or these "
                "with --tail unknown"
            )
        if len(traces) >= _NUM_LOOKED_AT:
            break
    if not traces:
        raise SourceError(f"{rows.path}: no row can be imported: {last or 'there is none'}")
    try:
        shift = found_shift(traces) if config.row_shift is None else config.row_shift
    except SourceError as error:
        raise SourceError(f"{rows.path}: {error}") from error
    is_fitted = isinstance(parse, DistillKit)
    if has_tails:
        is_logits = is_fitted and isinstance(parse, DistillKit) and parse.is_legacy
        _require_tails(rows.path, traces, is_logits=is_logits)
    return Meaning(shift, has_tails, FITTED_EXCESS if is_fitted else EXACT_EXCESS)


def _require_tails(path: Path, traces: list[ForeignTrace], *, is_logits: bool) -> None:
    """Refuse rows that do not tell the mass outside their entries.

    Raises:
        SourceError: If they are logits, or were divided by their sums.
    """
    if is_logits:
        raise SourceError(
            f"{path}: rows of DistillKit's older kind are logits less their mean, without a "
            "normaliser: the probability outside the entries is not in them. Import them with "
            "--tail unknown"
        )
    finite = [t.values[np.isfinite(t.values).any(axis=1)] for t in traces if t.values.size]
    sums = np.concatenate([log_sums(values) for values in finite] or [np.zeros(0)])
    largest = np.concatenate([values.max(axis=1) for values in finite] or [np.zeros(0)])
    if len(sums) and (np.expm1(sums) > FITTED_EXCESS).mean() > 1 / 2:
        raise SourceError(
            f"{path}: the entries' probabilities add up to {np.exp(np.median(sums)):.4g} in the "
            "median row: these are no logprobs. If they are logits: --values logits"
        )
    unsure = sums[largest < np.log(_SURE)]
    if len(unsure) >= _FEWEST_UNSURE and (np.abs(np.expm1(unsure)) < _RENORMALISED).all():
        raise SourceError(
            f"{path}: in all {len(unsure):,} rows that are not sure of their token the entries "
            "add up to 1 exactly: they were divided by their sums, and the probability outside "
            "them is lost. Import them with --tail unknown"
        )


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
            traces = parse(values)
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
