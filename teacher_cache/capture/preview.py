"""`cache-teacher preview`: rows as a capture would see them, before any GPU is used."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from teacher_cache.capture.configs import PreviewConfig
from teacher_cache.capture.prepare import model_files, row_columns, teacher_tokenizer
from teacher_cache.sources import (
    BadRow,
    Input,
    PromptRenderer,
    SourceTrace,
    TraceRenderer,
    responses_of,
    row_values,
)
from teacher_cache.sources.rollouts import facts_of_input
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.sources.turn_layout import layout_lines

_ANY_LENGTH = 1 << 40  # a preview also shows rows that are too long
_CONTEXT_CHARS = 40  # around a difference


@dataclass(frozen=True)
class ShownRow:
    """A row as it would be captured, or the reason why it would be left out."""

    where: str  # file and number
    trace_id: str = ""
    num_tokens: int = 0
    sections: tuple[tuple[str, str], ...] = ()  # name and text, end tokens between ⟦ and ⟧
    rejected: str | None = None
    beside: str | None = None  # comparison with the template's own rendering


def preview_lines(config: PreviewConfig) -> list[str]:
    """Facts about the teacher's turn: marks, joints, end, end tokens.

    Raises:
        EngineError: If the model's files cannot be loaded.
    """
    tokenizer = teacher_tokenizer(config, model_files(config))
    ends = ", ".join(repr(tokenizer.decode([token])) for token in tokenizer.terminal_ids)
    reads = tokenizer.layout().reads or "no known name"
    return [
        *layout_lines(tokenizer.layout()),
        f"the template reads reasoning under {reads}; end tokens {ends or 'none'}",
    ]


def preview_rows(config: PreviewConfig) -> Iterator[ShownRow]:
    """Render the first rows of the input.

    Raises:
        EngineError: If the model's files cannot be loaded.
        SourceError: If the input cannot be read.
    """
    path = config.prompts or config.traces
    if path is None:
        return
    files = model_files(config)
    tokenizer, vocab_size = teacher_tokenizer(config, files), files.vocab_size()
    columns = row_columns(config)
    prompts = PromptRenderer(tokenizer, _ANY_LENGTH, vocab_size, columns)
    rows = Input(Path(path), config.dataset_config, config.split)
    rollout = facts_of_input(rows) if config.traces is not None else None
    traces = TraceRenderer(tokenizer, _ANY_LENGTH, vocab_size, columns, rollout=rollout)
    for row in islice(rows, config.limit):
        where = f"{row.file}:{row.number}"
        try:
            values = row_values(row)
            if config.prompts is not None:
                yield _shown(where, prompts(values), tokenizer, None)
                continue
            for one in responses_of(values, columns):
                trace = traces(one)
                own = None if "token_ids" in one else traces.template_rendering(one)
                yield _shown(where, trace, tokenizer, own)
        except BadRow as error:
            yield ShownRow(where, rejected=f"{error} [{error.reason}]")


def _shown(
    where: str, trace: SourceTrace, tokenizer: TeacherTokenizer, own: str | None
) -> ShownRow:
    ids = trace.token_ids
    start, end = trace.bounds or (trace.num_prompt, trace.num_prompt)
    if trace.bounds is None and trace.opened_at is not None:
        start, end = trace.opened_at, trace.num_prompt
    parts = (("prompt", ids[:start]), ("cot", ids[start:end]), ("answer", ids[end:]))
    sections = tuple((name, _marked(part, tokenizer)) for name, part in parts if part)
    beside = None
    if own is not None:
        beside = difference(tokenizer.decode(ids), own)
    return ShownRow(where, trace.trace_id, len(ids), sections, beside=beside)


def _marked(ids: tuple[int, ...], tokenizer: TeacherTokenizer) -> str:
    """Text with every end token between ⟦ and ⟧."""
    text, run = "", list[int]()
    for token in ids:
        if token in tokenizer.terminal_ids:
            text += tokenizer.decode(run) + f"⟦{tokenizer.decode([token])}⟧"
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run)


def difference(ours: str, own: str) -> str:
    """Compare a trace's text with the template's own rendering of the conversation."""
    if own.startswith(ours):
        rest = own[len(ours) :]
        return "the same" + (f", and then {rest!r}" if rest else "")
    same = next(
        (n for n, (a, b) in enumerate(zip(ours, own, strict=False)) if a != b),
        min(len(ours), len(own)),
    )
    if same == len(own):
        return f"the same up to its end; ours continues with {ours[same:]!r}"
    around = slice(max(0, same - _CONTEXT_CHARS), same + _CONTEXT_CHARS)
    return f"differs at character {same}: ours {ours[around]!r}, its own {own[around]!r}"
