"""The user's prompts and traces: JSONL rows -> token ids and section bounds."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teacher_cache.format import content_hash
from teacher_cache.tokenizer import TeacherTokenizer


class SourceError(ValueError):
    """A row of the input cannot be used; the message names file, line and reason."""


@dataclass(frozen=True)
class SourceTrace:
    """One row of the input, rendered: a prompt, or a whole trace."""

    trace_id: str
    token_ids: tuple[int, ...]
    num_prompt: int  # tokens of the prompt; all of them where traces are generated
    bounds: tuple[int, int] | None  # (cot_start, answer_start) where the row states them
    fields: Mapping[str, Any]  # the user's own, which travel with the trace

    @property
    def source_hash(self) -> str:
        """Of the tokens and bounds: an input that changed under the same id is noticed."""
        return content_hash([self.token_ids, self.bounds])


Render = Callable[[dict[str, Any]], SourceTrace]


@dataclass
class Source:
    """A JSONL file of prompts or traces.

    Iterating reads it from the start. With `skip_bad`, rows that cannot be used are passed over
    and their reasons kept in `bad`; without, the first of them raises SourceError.
    """

    path: Path
    render: Render
    skip_bad: bool
    bad: list[str] = field(default_factory=list)  # of the last reading

    def __iter__(self) -> Iterator[SourceTrace]:
        """Yield the rendered rows, each id once."""
        self.bad.clear()
        seen: dict[str, int] = {}
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                trace = self.render(_parse(line))
                if trace.trace_id in seen:
                    raise ValueError(
                        f"id {trace.trace_id!r} stands in line {seen[trace.trace_id]} already"
                    )
            except ValueError as error:
                message = f"{self.path}:{number}: {error}"
                if not self.skip_bad:
                    raise SourceError(
                        f"{message}. Mend the line, or pass over such lines with --skip-bad-lines."
                    ) from error
                self.bad.append(message)
                continue
            seen[trace.trace_id] = number
            yield trace

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                yield from enumerate(file, start=1)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair, which is no character") from error
    return row


@dataclass(frozen=True)
class PromptRenderer:
    """Rows with `prompt` (text, taken as it is) or `messages` (the chat template is applied)."""

    tokenizer: TeacherTokenizer
    max_tokens: int  # a prompt must leave room for one token

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row."""
        ids = _prompt_ids(row, self.tokenizer)
        if len(ids) >= self.max_tokens:
            raise ValueError(
                f"prompt of {len(ids)} tokens; the teacher's context of {self.max_tokens} leaves "
                "no room for an answer"
            )
        own = _own_fields(row, "prompt", "messages")
        return SourceTrace(_trace_id(row, ids), tuple(ids), len(ids), None, own)


@dataclass(frozen=True)
class TraceRenderer:
    """Rows that hold a whole trace, in one of these shapes.

    - `token_ids` with `cot_start` and `answer_start`: taken as they are.
    - `messages`, the last one from the assistant, its chain of thought in `reasoning_content` or
      between thinking marks inside `content`.
    - `prompt` (text) and `response`, the chain of thought in `reasoning_content` or between marks.

    The assistant's turn is rendered by hand after the template's generation prompt: templates
    strip the thinking from assistant turns, and a trace must hold every token of it.
    """

    tokenizer: TeacherTokenizer
    max_tokens: int
    vocab_size: int  # of the teacher's softmax: padded ids are sampled now and then

    def __call__(self, row: dict[str, Any]) -> SourceTrace:
        """Render one row."""
        if "token_ids" in row:
            trace = self._ready_ids(row)
        elif "messages" in row:
            trace = self._conversation(row)
        else:
            trace = self._prompt_and_response(row)
        if len(trace.token_ids) > self.max_tokens:
            raise ValueError(
                f"trace of {len(trace.token_ids)} tokens; the teacher's context holds "
                f"{self.max_tokens}"
            )
        return trace

    def _ready_ids(self, row: dict[str, Any]) -> SourceTrace:
        ids = row["token_ids"]
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise ValueError("`token_ids` must be a list of at least one integer")
        try:
            bounds = (int(row["cot_start"]), int(row["answer_start"]))
        except (KeyError, TypeError) as error:
            raise ValueError("`token_ids` needs `cot_start` and `answer_start`") from error
        if not 0 <= bounds[0] <= bounds[1] <= len(ids):
            raise ValueError(
                f"expected 0 <= cot_start <= answer_start <= {len(ids)}, "
                f"got cot_start={bounds[0]}, answer_start={bounds[1]}"
            )
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the teacher's vocabulary of {self.vocab_size}"
            )
        own = _own_fields(row, "token_ids", "cot_start", "answer_start")
        return SourceTrace(_trace_id(row, ids), tuple(ids), bounds[0], bounds, own)

    def _conversation(self, row: dict[str, Any]) -> SourceTrace:
        messages = _messages(row)
        last = messages[-1]
        if last.get("role") != "assistant":
            raise ValueError(
                f"the last message must be the assistant's, got role {last.get('role')!r}"
            )
        prompt = _prompt_ids({"messages": messages[:-1]}, self.tokenizer)
        trace = self._joined(prompt, last.get("reasoning_content"), last.get("content"))
        return self._with_identity(trace, row, "messages")

    def _prompt_and_response(self, row: dict[str, Any]) -> SourceTrace:
        if "response" not in row:
            raise ValueError(
                "expected `token_ids`, `messages`, or `prompt` and `response`; "
                f"found {', '.join(sorted(row)) or 'nothing'}"
            )
        prompt = _prompt_ids(row, self.tokenizer)
        trace = self._joined(prompt, row.get("reasoning_content"), row["response"])
        return self._with_identity(trace, row, "prompt", "response", "reasoning_content")

    def _joined(
        self, prompt: list[int], reasoning: object, answer: object
    ) -> tuple[list[int], int, tuple[int, int] | None]:
        """Ids, length of the prompt, and bounds where the parts were given apart."""
        if not isinstance(answer, str) or not isinstance(reasoning, str | None):
            raise ValueError("the response and its reasoning must be text")
        if not answer and not reasoning:
            raise ValueError("the response is empty")
        marks, encode = self.tokenizer.marks, self.tokenizer.encode
        opened_at = left_open(prompt, self.tokenizer)
        opened = opened_at >= 0
        end = [] if self.tokenizer.end_id is None else [self.tokenizer.end_id]
        if reasoning is None:
            if opened:  # the template has written the opening mark already
                answer = answer.removeprefix(marks.open)
            return [*prompt, *encode(answer), *end], len(prompt), None
        head = "" if opened else f"{marks.open}\n"
        chain = encode(f"{head}{reasoning}\n{marks.close}")
        ids = [*prompt, *chain, *encode(f"\n\n{answer}"), *end]
        return ids, len(prompt), (opened_at if opened else len(prompt), len(prompt) + len(chain))

    def _with_identity(
        self,
        trace: tuple[list[int], int, tuple[int, int] | None],
        row: dict[str, Any],
        *used: str,
    ) -> SourceTrace:
        ids, num_prompt, bounds = trace
        own = _own_fields(row, *used)
        return SourceTrace(_trace_id(row, ids), tuple(ids), num_prompt, bounds, own)


def _prompt_ids(row: Mapping[str, Any], tokenizer: TeacherTokenizer) -> list[int]:
    if "messages" in row:
        ids = tokenizer.encode(tokenizer.render_chat(_messages(row)))
    elif "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ValueError(f"`prompt` must be text, got {type(row['prompt']).__name__}")
        if not row["prompt"].strip():
            raise ValueError("the prompt is empty")
        ids = tokenizer.encode_document(row["prompt"])
    else:
        found = ", ".join(sorted(row)) or "nothing"
        raise ValueError(f"expected `prompt` or `messages`, found {found}")
    if not ids:
        raise ValueError("the prompt has no tokens")
    return ids


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` must be a list of at least one message")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError("every message must be an object with a `role`")
    if all(not m.get("content") and not m.get("reasoning_content") for m in messages):
        raise ValueError("the prompt is empty: no message has content")
    return messages


def _trace_id(row: Mapping[str, Any], ids: Sequence[int]) -> str:
    """The user's id, or a hash of the tokens."""
    given = row.get("id")
    if given is None:
        return content_hash(list(ids))[:16]
    if not isinstance(given, str | int) or given == "":
        raise ValueError(f"`id` must be text or an integer, got {given!r}")
    return str(given)


def _own_fields(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in {"id", *used}}


def find_first(ids: Sequence[int], mark: Sequence[int], start: int = 0) -> int:
    """Where `mark` first stands in `ids` at or after `start`; -1 where it does not."""
    width = len(mark)
    for position in range(start, len(ids) - width + 1):
        if ids[position] == mark[0] and tuple(ids[position : position + width]) == tuple(mark):
            return position
    return -1


def find_last(ids: Sequence[int], mark: Sequence[int]) -> int:
    """Where `mark` last stands in `ids`; -1 where it does not."""
    position = find_first(ids[::-1], mark[::-1])
    return -1 if position < 0 else len(ids) - position - len(mark)


def find_sections(
    ids: Sequence[int], num_prompt: int, tokenizer: TeacherTokenizer
) -> tuple[int, int]:
    """(cot_start, answer_start) of a trace whose response begins at `num_prompt`.

    The chain of thought begins with its opening mark, which a template may have put at the end of
    the prompt, and ends with the first closing mark of the response; without a closing mark it
    reaches to the end. A response without any mark has no chain of thought.
    """
    prompt, response = ids[:num_prompt], ids[num_prompt:]
    cot_start = left_open(prompt, tokenizer)
    closed = _end_of_first(response, tokenizer.close_ids, tokenizer.marks.close, tokenizer)
    if cot_start < 0:
        opened = _end_of_first(response, tokenizer.open_ids, tokenizer.marks.open, tokenizer)
        if opened < 0 and closed < 0:
            return num_prompt, num_prompt
        cot_start = num_prompt
    return cot_start, len(ids) if closed < 0 else num_prompt + closed


def left_open(prompt: Sequence[int], tokenizer: TeacherTokenizer) -> int:
    """Where the opening mark stands that the prompt does not close; -1 where there is none."""
    if len(tokenizer.open_ids) == len(tokenizer.close_ids) == 1:
        opened = find_last(prompt, tokenizer.open_ids)
        return opened if opened > find_last(prompt, tokenizer.close_ids) else -1
    text = tokenizer.decode(prompt)
    if text.rfind(tokenizer.marks.open) <= text.rfind(tokenizer.marks.close):
        return -1
    # The last token from which on the mark is still whole.
    return bisect_left(
        range(len(prompt)),
        True,
        key=lambda start: tokenizer.marks.open not in tokenizer.decode(prompt[start + 1 :]),
    )


def _end_of_first(
    ids: Sequence[int], mark_ids: Sequence[int], mark: str, tokenizer: TeacherTokenizer
) -> int:
    """The end of the first mark, in tokens; -1 where there is none.

    A mark of several tokens is looked for in the text: its last token may be merged with what
    follows, and then belongs to the mark.
    """
    if len(mark_ids) == 1:
        position = find_first(ids, mark_ids)
        return position + 1 if position >= 0 else -1
    if mark not in tokenizer.decode(ids):
        return -1
    return 1 + bisect_left(
        range(len(ids)), True, key=lambda last: mark in tokenizer.decode(ids[: last + 1])
    )
