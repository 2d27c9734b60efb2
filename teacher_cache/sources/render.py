"""Rows -> token ids and section bounds, exactly as the teacher would have produced them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.format import content_hash
from teacher_cache.sources.columns import Exchange, RowColumns, read_prompt, read_trace
from teacher_cache.sources.conversations import Message, rendered, with_own_history
from teacher_cache.sources.marks_in_text import continued, response_of
from teacher_cache.sources.marks_in_tokens import find_sections, left_open
from teacher_cache.sources.prompt_turns import tokens_of_others
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.slices import TraceSlice
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.sources.trace import SourceTrace, TokenRanges


@dataclass(frozen=True)
class PromptRenderer:
    """Rows with a prompt: text, taken as it is, or messages, given to the chat template."""

    tokenizer: TeacherTokenizer
    max_tokens: int  # a prompt must leave room for one token
    vocab_size: int  # of the teacher's softmax
    layout: RowColumns

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row; raises BadRow."""
        exchange = read_prompt(row, self.layout)
        ids, without_rows = _prompt_ids(exchange, self.tokenizer, self.layout)
        if len(ids) >= self.max_tokens:
            raise BadRow(
                Reason.PROMPT_TOO_LONG,
                f"prompt of {len(ids)} tokens; {self.max_tokens} of prompt and answer together fit "
                "(the teacher's context, or --stop-at-tokens)",
            )
        _check_vocabulary(ids, self.vocab_size)
        own = _own_fields(row, self.layout.id_field, *exchange.used)
        name = _trace_id(row, self.layout.id_field, ids)
        return SourceTrace(name, tuple(ids), len(ids), None, own, without_rows=without_rows)


@dataclass(frozen=True)
class TraceRenderer:
    """Rows that hold a whole trace, in one of these shapes.

    - `token_ids` with `cot_start` and `answer_start`: taken as they are.
    - `messages` or `conversations`, the last one from the assistant, its chain of thought apart
      (`reasoning_content`, `reasoning`, `thinking`) or between thinking marks in the content.
    - A prompt and a response, the chain of thought likewise.

    The assistant's turn is rendered by hand after the template's generation prompt: templates
    strip the thinking from assistant turns, and a trace must hold every token of it. A response
    that broke off (no closing mark, or a column `finish_reason` that says `length`) has no
    end-of-turn token.
    """

    tokenizer: TeacherTokenizer
    max_tokens: int
    vocab_size: int  # of the teacher's softmax: padded ids are sampled now and then
    layout: RowColumns
    slice: TraceSlice | None = None

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row; raises BadRow."""
        is_ready = self.layout.prompt_field is None and row.get("token_ids") is not None
        trace = self._ready_ids(row) if is_ready else self._rendered(row)
        if self.slice is not None:
            trace = self.slice.cut(trace)
        if len(trace.token_ids) < 2:
            raise BadRow(
                Reason.TRACE_TOO_SHORT, "one token; the first of a sequence has no distribution"
            )
        _check_vocabulary(trace.token_ids, self.vocab_size)
        if len(trace.token_ids) > self.max_tokens:
            raise BadRow(
                Reason.TRACE_TOO_LONG,
                f"trace of {len(trace.token_ids)} tokens; the teacher's context holds "
                f"{self.max_tokens}",
            )
        return trace

    def _ready_ids(self, row: dict[str, Any]) -> SourceTrace:
        ids = row["token_ids"]
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise BadRow(Reason.BAD_TOKEN_IDS, "`token_ids` must be a list of at least one integer")
        cot_start, answer_start = row.get("cot_start"), row.get("answer_start")
        if not isinstance(cot_start, int) or not isinstance(answer_start, int):
            raise BadRow(
                Reason.BAD_BOUNDS,
                "`token_ids` needs `cot_start` and `answer_start`, which are integers",
            )
        if not 0 <= cot_start <= answer_start <= len(ids):
            raise BadRow(
                Reason.BAD_BOUNDS,
                f"expected 0 <= cot_start <= answer_start <= {len(ids)}, "
                f"got cot_start={cot_start}, answer_start={answer_start}",
            )
        own = _own_fields(row, self.layout.id_field, "token_ids", "cot_start", "answer_start")
        return SourceTrace(
            _trace_id(row, self.layout.id_field, ids),
            tuple(ids),
            cot_start,
            (cot_start, answer_start),
            own,
            _finish_reason(row, is_cut=self._is_open(ids, (cot_start, answer_start))),
            () if self.layout.prompt_turns == "all" or not cot_start else ((0, cot_start),),
        )

    def _is_open(self, ids: Sequence[int], bounds: tuple[int, int]) -> bool:
        """Whether the trace ends inside its chain of thought."""
        if not bounds[0] < bounds[1] == len(ids):
            return False
        return self.tokenizer.marks.close not in self.tokenizer.decode(ids[bounds[0] :])

    def _rendered(self, row: dict[str, Any]) -> SourceTrace:
        exchange = read_trace(row, self.layout)
        prompt, without_rows = _prompt_ids(exchange, self.tokenizer, self.layout)
        text, is_cut = self._response(exchange, prompt)
        ids = prompt + self.tokenizer.encode(text)
        bounds = find_sections(ids, len(prompt), self.tokenizer)
        is_open = self._is_open(ids, bounds)
        if is_open and row.get("finish_reason") == "stop":
            raise BadRow(
                Reason.UNCLOSED_CHAIN_OF_THOUGHT,
                f"`finish_reason` says that the response is whole, but it lacks "
                f"{self.tokenizer.marks.close}",
            )
        finish_reason = _finish_reason(row, is_cut=is_cut or is_open)
        end_id = self.tokenizer.end_id
        if finish_reason is None and end_id is not None and ids[-1] != end_id:
            ids.append(end_id)
        return SourceTrace(
            _trace_id(row, self.layout.id_field, ids),
            tuple(ids),
            len(prompt),
            bounds,
            _own_fields(row, self.layout.id_field, *exchange.used),
            finish_reason,
            without_rows,
        )

    def _response(self, exchange: Exchange, prompt: list[int]) -> tuple[str, bool]:
        """The text after the prompt, and whether it broke off."""
        marks = self.tokenizer.marks
        answer = exchange.answer or ""
        if not answer.strip() and not (exchange.reasoning or "").strip():
            raise BadRow(Reason.EMPTY_RESPONSE, "the response is empty")
        response = response_of(exchange.reasoning, answer, marks)
        opened_at = left_open(prompt, self.tokenizer)
        opened = None if opened_at < 0 else self.tokenizer.decode(prompt[opened_at:])
        says_none = exchange.reasoning is not None and not exchange.reasoning.strip()
        if opened is not None and says_none and marks.close not in response.text:
            raise BadRow(
                Reason.EMPTY_CHAIN_OF_THOUGHT,
                f"the chat template opens a chain of thought with {marks.open}, the row's is empty",
            )
        return continued(response.text, opened, marks), response.is_cut


def _finish_reason(row: Mapping[str, Any], *, is_cut: bool) -> str | None:
    return "length" if is_cut or row.get("finish_reason") == "length" else None


def _prompt_ids(
    exchange: Exchange, tokenizer: TeacherTokenizer, layout: RowColumns
) -> tuple[list[int], TokenRanges]:
    """Tokens of the prompt, and the spans of them that get no distributions."""
    messages: list[Message] = []
    if isinstance(exchange.prompt, str):
        ids = tokenizer.encode_document(exchange.prompt)
    else:
        messages = with_own_history(exchange.prompt, tokenizer.marks)
        ids = tokenizer.encode(rendered(messages, exchange.tools, tokenizer))
    if not ids:
        raise BadRow(Reason.EMPTY_PROMPT, "the prompt has no tokens")
    if layout.prompt_turns == "all":
        return ids, ()
    return ids, tokens_of_others(messages, exchange.tools, ids, tokenizer)


def _check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    if min(ids) < 0 or max(ids) >= vocab_size:
        outside = next(i for i in ids if not 0 <= i < vocab_size)
        raise BadRow(
            Reason.TOKEN_OUTSIDE_VOCABULARY,
            f"token id {outside} is outside the teacher's vocabulary of {vocab_size}",
        )


def given_id(row: Mapping[str, Any], id_field: str) -> str | None:
    """The user's own name of a row; None where there is none.

    Raises:
        BadRow: If it is none.
    """
    given = row.get(id_field)
    if given is None:
        return None
    if not isinstance(given, str | int) or isinstance(given, bool) or given == "":
        raise BadRow(Reason.BAD_ID, f"`{id_field}` must be text or an integer, got {given!r}")
    return str(given)


def _trace_id(row: Mapping[str, Any], id_field: str, ids: Sequence[int]) -> str:
    return given_id(row, id_field) or content_hash(list(ids))[:16]


def _own_fields(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    own = {name: value for name, value in row.items() if name not in used}
    try:
        json.dumps(own, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(
            Reason.FIELD_NOT_JSON, f"a field cannot be written as JSON: {error}"
        ) from error
    return own
