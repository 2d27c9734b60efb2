"""Renders rows as token ids and section bounds, exactly as the teacher would produce them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_cache.format import content_hash, lead_span_length
from teacher_cache.sources.columns import Exchange, RowColumns, read_prompt, read_trace
from teacher_cache.sources.conversations import Conversation, Message
from teacher_cache.sources.marks_in_tokens import find_sections, opening_token
from teacher_cache.sources.prompt_turns import tokens_of_others
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.responses import own_rendering, response_of
from teacher_cache.sources.rollouts import (
    COLUMNS,
    check_facts,
    check_same_text,
    read_rollout,
    rollout_facts,
)
from teacher_cache.sources.slices import TraceSlice
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.sources.trace import SourceTrace, TokenRanges
from teacher_cache.sources.turn_layout import Prompt, TurnLayout, prompt_state


@dataclass(frozen=True)
class PromptRenderer:
    """Rows with a prompt: text, used as it is, or messages for the chat template."""

    tokenizer: TeacherTokenizer
    max_tokens: int  # a prompt must leave room for one token
    vocab_size: int  # of the teacher's softmax
    columns: RowColumns

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row; raises BadRow."""
        exchange = read_prompt(row, self.columns)
        prompt = _rendered_prompt(exchange, self.tokenizer, self.columns)
        ids = prompt.token_ids
        if len(ids) >= self.max_tokens:
            raise BadRow(
                Reason.PROMPT_TOO_LONG,
                f"prompt of {len(ids)} tokens; {self.max_tokens} fit together with the answer "
                "(the teacher's context, or --stop-at-tokens)",
            )
        _check_ids(ids, self.vocab_size, self.tokenizer)
        return SourceTrace(
            _trace_id(row, self.columns.id_field, ids),
            tuple(ids),
            len(ids),
            None,
            own_fields(row, self.columns.id_field, *exchange.used),
            without_rows=prompt.without_rows,
            opened_at=prompt.opened_at,
            messages=_asked(exchange),
            marks=prompt.layout.marks,
        )


@dataclass(frozen=True)
class TraceRenderer:
    """Rows with a whole trace, in one of these shapes.

    - `token_ids` with `cot_start` and `answer_start`: used as they are.
    - `messages` or `conversations`, the last message the assistant's, its chain of thought separate
      (`reasoning_content`, `reasoning`, `thinking`) or between thinking marks in the content.
    - A prompt and a response, with the chain of thought likewise.
    - A rollout of a student: `token_ids`, used as they are once prompt and text are the teacher's
      too.

    The prompt is rendered as for generating, and the assistant's turn follows as the teacher
    writes it (see `turn_layout`): a trace has every token of it, even if a template drops
    the reasoning. A response that broke off (no closing mark, or a column `finish_reason` that
    says `length`) has no end-of-turn token.
    """

    tokenizer: TeacherTokenizer
    max_tokens: int
    vocab_size: int  # of the teacher's softmax: padded ids are occasionally sampled
    columns: RowColumns
    slice: TraceSlice | None = None
    lead_span: float = 1.0  # of every trace; what comes after it the teacher does not see
    rollout: Mapping[str, Any] | None = None  # whose rollouts all rows are; None if they are none

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row; raises BadRow."""
        check_facts(rollout_facts(row), self.rollout)
        is_ready = self.columns.prompt_field is None and row.get("token_ids") is not None
        if self.rollout is not None:
            trace = self._rollout(row)
        else:
            trace = self._ready_ids(row) if is_ready else self._rendered(row)
        if self.slice is not None:
            trace = self.slice.cut(trace)
        if len(trace.token_ids) < 2:
            raise BadRow(
                Reason.TRACE_TOO_SHORT, "one token; the first of a sequence has no distribution"
            )
        _check_ids(trace.token_ids, self.vocab_size, self.tokenizer)
        num_seen = lead_span_length(len(trace.token_ids), self.lead_span)
        if num_seen > self.max_tokens:
            span = "" if self.lead_span == 1.0 else f"lead span of {num_seen} in a "
            raise BadRow(
                Reason.TRACE_TOO_LONG,
                f"{span}trace of {len(trace.token_ids)} tokens; the teacher's context holds "
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
        own = own_fields(row, self.columns.id_field, "token_ids", "cot_start", "answer_start")
        return SourceTrace(
            _trace_id(row, self.columns.id_field, ids),
            tuple(ids),
            cot_start,
            (cot_start, answer_start),
            own,
            _finish_reason(row, is_cut=self._is_open(ids, (cot_start, answer_start))),
            () if self.columns.prompt_turns == "all" or not cot_start else ((0, cot_start),),
        )

    def _rollout(self, row: dict[str, Any]) -> SourceTrace:
        rollout, exchange = read_rollout(row), read_prompt(row, self.columns)
        prompt = _rendered_prompt(exchange, self.tokenizer, self.columns)
        ids, num_prompt = rollout.token_ids, rollout.num_prompt
        _check_ids(ids, self.vocab_size, self.tokenizer)
        check_same_text(
            rollout,
            prompt.token_ids,
            prompt.text,
            asked=self.tokenizer.decode(ids[:num_prompt]),
            said=self.tokenizer.decode(ids[num_prompt:]),
        )
        marks = prompt.layout.marks
        return SourceTrace(
            _trace_id(row, self.columns.id_field, ids),
            ids,
            num_prompt,
            find_sections(list(ids), num_prompt, prompt.opened_at, marks, self.tokenizer),
            own_fields(row, self.columns.id_field, *exchange.used, *COLUMNS),
            "length" if rollout.is_cut else None,
            prompt.without_rows,
            messages=_asked(exchange),
            student_logprobs=rollout.student_logprobs,
        )

    def template_rendering(self, row: dict[str, Any]) -> str | None:
        """Render a row's whole conversation with the chat template itself.

        None if the row is not a conversation, or the template refuses it; raises BadRow.
        """
        exchange = read_trace(row, self.columns)
        prompt = _rendered_prompt(exchange, self.tokenizer, self.columns)
        if prompt.conversation is None:
            return None
        return own_rendering(exchange, prompt.conversation, prompt.layout)

    def _is_open(self, ids: Sequence[int], bounds: tuple[int, int]) -> bool:
        """Whether a finished trace ends inside its chain of thought."""
        marks = self.tokenizer.layout().marks
        if marks is None or not bounds[0] < bounds[1] == len(ids):
            return False
        return marks.close not in self.tokenizer.decode(ids[bounds[0] :])

    def _rendered(self, row: dict[str, Any]) -> SourceTrace:
        exchange = read_trace(row, self.columns)
        prompt = _rendered_prompt(exchange, self.tokenizer, self.columns)
        response = response_of(
            exchange,
            prompt.conversation,
            prompt.text,
            prompt.layout,
            self.tokenizer.end_tokens,
            is_cut=row.get("finish_reason") == "length",
        )
        marks = prompt.layout.marks
        if response.is_cut and row.get("finish_reason") == "stop" and marks is not None:
            raise BadRow(
                Reason.UNCLOSED_CHAIN_OF_THOUGHT,
                f"`finish_reason` says that the response is complete, but it lacks {marks.close}",
            )
        num_prompt = len(prompt.token_ids)
        ids = prompt.token_ids + self.tokenizer.encode(response.text)
        bounds = (num_prompt, num_prompt)
        if response.has_thought:
            bounds = find_sections(ids, num_prompt, prompt.opened_at, marks, self.tokenizer)
        return SourceTrace(
            _trace_id(row, self.columns.id_field, ids),
            tuple(ids),
            num_prompt,
            bounds,
            own_fields(row, self.columns.id_field, *exchange.used),
            "length" if response.is_cut else None,
            prompt.without_rows,
            messages=_asked(exchange),
        )


@dataclass(frozen=True)
class _Prompt:
    """A rendered prompt, and the layout of the assistant's turn after it."""

    text: str
    token_ids: list[int]
    without_rows: TokenRanges  # its tokens that get no distributions
    layout: TurnLayout  # its `prompt` describes this very prompt
    opened_at: int | None  # token at which it opens a chain of thought
    conversation: Conversation | None  # None if the row's text is the prompt


def _finish_reason(row: Mapping[str, Any], *, is_cut: bool) -> str | None:
    return "length" if is_cut or row.get("finish_reason") == "length" else None


def _rendered_prompt(
    exchange: Exchange, tokenizer: TeacherTokenizer, columns: RowColumns
) -> _Prompt:
    conversation = None
    if isinstance(exchange.prompt, str):
        text = exchange.prompt
        layout = tokenizer.layout()
        ids = tokenizer.encode_document(text)
        # A text does not show where its last turn begins: only its very end can open a thought.
        mark = layout.marks.open if layout.marks is not None else ""
        state = Prompt.OPENS if mark and text.rstrip().endswith(mark) else Prompt.LEAVES
        others: TokenRanges = ((0, len(ids)),)
    else:
        conversation = _conversation(exchange, exchange.prompt, tokenizer)
        layout = conversation.layout
        text = conversation.prompt()
        ids = tokenizer.encode(text)
        state = prompt_state(conversation.header(text), layout.marks)
        keeps_all = columns.prompt_turns == "all"
        others = () if keeps_all else tokens_of_others(conversation, ids, tokenizer)
    if not ids:
        raise BadRow(Reason.EMPTY_PROMPT, "the prompt has no tokens")
    opened_at = None
    if state is Prompt.OPENS and layout.marks is not None:
        opened_at = opening_token(ids, layout.marks.open, tokenizer)
    return _Prompt(
        text,
        ids,
        () if columns.prompt_turns == "all" else others,
        replace(layout, prompt=state),
        opened_at,
        conversation,
    )


def _asked(exchange: Exchange) -> dict[str, Any] | None:
    """Messages of a prompt, for the cache: they cannot be recovered from the rendered tokens."""
    if isinstance(exchange.prompt, str):
        return None
    asked: dict[str, Any] = {"messages": exchange.prompt}
    if exchange.tools:
        asked["tools"] = exchange.tools
    if exchange.template_args:
        asked["chat_template_kwargs"] = dict(exchange.template_args)
    if exchange.tool_calls:
        asked["response"] = {
            "role": "assistant",
            "content": exchange.answer,
            "reasoning_content": exchange.reasoning or "",
            "tool_calls": exchange.tool_calls,
        }
    try:
        json.dumps(asked, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(
            Reason.FIELD_NOT_JSON, f"a message cannot be written as JSON: {error}"
        ) from error
    return asked


def _conversation(
    exchange: Exchange, messages: list[Message], tokenizer: TeacherTokenizer
) -> Conversation:
    template = tokenizer.template
    arguments = {**template.arguments, **exchange.template_args}
    try:
        template.check_arguments(exchange.template_args)
        layout = tokenizer.layout(arguments)
    except ValueError as error:
        raise BadRow(Reason.BAD_TEMPLATE_ARGS, str(error)) from error
    return Conversation(template, layout, messages, exchange.tools, arguments)


def _check_ids(ids: Sequence[int], vocab_size: int, tokenizer: TeacherTokenizer) -> None:
    begin = tokenizer.begin_id
    # Some models have one token for the begin and the end.
    if begin is not None and begin != tokenizer.end_id and list(ids[:2]) == [begin, begin]:
        raise BadRow(
            Reason.SECOND_BEGIN_TOKEN,
            f"it begins with {tokenizer.decode([begin])} twice, which no teacher has seen: one is "
            "in the row's text, one comes from the tokenizer or the chat template",
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        outside = next(i for i in ids if not 0 <= i < vocab_size)
        raise BadRow(
            Reason.TOKEN_OUTSIDE_VOCABULARY,
            f"token id {outside} is outside the teacher's vocabulary of {vocab_size}",
        )


def given_id(row: Mapping[str, Any], id_field: str) -> str | None:
    """The user's id of a row; None if there is none.

    Raises:
        BadRow: If it is not a valid id.
    """
    given = row.get(id_field)
    if given is None:
        return None
    if not isinstance(given, str | int) or isinstance(given, bool) or given == "":
        raise BadRow(Reason.BAD_ID, f"`{id_field}` must be text or an integer, got {given!r}")
    return str(given)


def _trace_id(row: Mapping[str, Any], id_field: str, ids: Sequence[int]) -> str:
    return given_id(row, id_field) or content_hash(list(ids))[:16]


def own_fields(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The user's own fields of a row: all but those used; raises BadRow if one is not JSON."""
    own = {name: value for name, value in row.items() if name not in used}
    try:
        json.dumps(own, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(
            Reason.FIELD_NOT_JSON, f"a field cannot be written as JSON: {error}"
        ) from error
    return own
