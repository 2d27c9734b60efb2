"""The shapes of rows: finds the prompt and the response, in whichever columns."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from teacher_cache.sources.conversations import (
    REASONING_NAMES,
    Message,
    messages_of,
    with_joined_turns,
    with_system,
)
from teacher_cache.sources.rejects import BadRow, Reason

PROMPT_TURNS = ("all", "assistant")
ASSISTANT_TURNS = ("last", "all")
CHAT_COLUMNS = ("messages", "conversations")
# Columns of a user's question as text: only used if a chat template is applied to them.
QUESTION_COLUMNS = ("question", "problem", "instruction", "query", "input")
PROMPT_LIKE_COLUMNS = (*CHAT_COLUMNS, "prompt", *QUESTION_COLUMNS)
SYSTEM_COLUMNS = ("system", "system_prompt")
TEMPLATE_ARGS_COLUMN = "chat_template_kwargs"  # as in a request to an OpenAI-like server
_RESPONSE_COLUMNS = (
    *("response", "completion", "content", "choices", "output", "attempt", "deepseek_attempt"),
    *("deepseek_solution", "generations"),
)
# Besides those of a message. Some data sets give one trajectory as a list.
_REASONING_COLUMNS = (
    *("thinking_trajectories", "deepseek_thinking_trajectory", "deepseek_reasoning"),
)
# Columns of a line of `train-student evaluate --completions`.
_EVALUATED = frozenset({"prompt", "sample", "found", "right", "compared_as", "completion"})
_SWITCHES = {"on", "off", "true", "false", "yes", "no"}  # of a `reasoning` column that is no text


@dataclass(frozen=True)
class RowColumns:
    """Layout of the user's rows; None searches the usual names."""

    id_field: str = "id"
    prompt_field: str | None = None
    response_field: str | None = None
    reasoning_field: str | None = None
    drop_system: bool = False
    apply_chat_template: bool = False  # to prompts that are text
    assistant_turns: str = ASSISTANT_TURNS[0]  # which turns of a conversation become traces
    prompt_turns: str = PROMPT_TURNS[0]  # which turns of the prompt get distributions


@dataclass(frozen=True)
class Exchange:
    """A parsed row: the teacher's prompt, and the response."""

    prompt: str | list[Message]  # text as it is, or messages for the chat template
    tools: list[Any] | None  # that the chat template may describe
    reasoning: str | None
    answer: str | None  # None if there is only a prompt
    used: tuple[str, ...]  # columns read; the others are the user's own
    tool_calls: list[Any] | None = None  # of the answer
    template_args: Mapping[str, object] = field(default_factory=dict)  # the row's own


def read_prompt(row: Mapping[str, Any], layout: RowColumns) -> Exchange:
    """A row's prompt, without a last turn of the assistant: the teacher answers anew.

    Raises:
        BadRow: If there is no prompt.
    """
    column = _prompt_column(row, layout)
    prompt, used = _asked(row, column, layout)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
        if not prompt:
            raise BadRow(Reason.EMPTY_PROMPT, "no message comes before the assistant's")
    return Exchange(
        prompt, _tools(row, prompt), None, None, used, template_args=_template_args(row, prompt)
    )


def read_trace(row: Mapping[str, Any], layout: RowColumns) -> Exchange:
    """A row's prompt and response.

    Raises:
        BadRow: If one of them is missing.
    """
    if _EVALUATED.issubset(row):
        raise BadRow(
            Reason.BAD_PROMPT,
            "a line of `train-student evaluate --completions` has the number of its prompt, not "
            "its tokens; let `train-student rollout` write the same model's traces",
        )
    column = _prompt_column(row, layout)
    prompt, used = _asked(row, column, layout)
    response = _response_column(row, layout)
    ends_in_answer = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
    if ends_in_answer and layout.response_field:
        prompt, ends_in_answer = prompt[:-1], False  # a column named by the user wins
    is_chat = ends_in_answer or response is None
    if not isinstance(prompt, str) and is_chat:
        last = prompt[-1]
        if last["role"] != "assistant":
            raise BadRow(
                Reason.NO_ASSISTANT_TURN,
                f"the last message must be the assistant's, got role {last['role']!r}",
            )
        *before, last = prompt
        if not before:
            raise BadRow(Reason.EMPTY_PROMPT, "no message comes before the assistant's")
        return Exchange(
            before,
            _tools(row, prompt),
            last.get("reasoning_content"),
            last["content"],
            used,
            last.get("tool_calls"),
            _template_args(row, prompt),
        )
    if response is None:
        expected = layout.response_field or "messages`, `conversations`, `token_ids` or `response"
        raise BadRow(
            Reason.UNKNOWN_COLUMNS,
            f"expected `{expected}`, found {_found(row)}; name yours with --response-field",
        )
    reasoning_column = _reasoning_column(row, layout)
    reasoning = None if reasoning_column is None else row[reasoning_column]
    answer, reasoning = _only(row[response]), _only(reasoning)
    if isinstance(answer, list | Mapping):
        answer, reasoning = _answer_of_messages(answer, response)
    if not isinstance(answer, str) or not isinstance(reasoning, str | None):
        raise BadRow(Reason.BAD_RESPONSE, "the response and its reasoning must be text")
    columns = (*used, response) if reasoning_column is None else (*used, response, reasoning_column)
    return Exchange(
        prompt,
        _tools(row, prompt),
        reasoning,
        answer,
        columns,
        template_args=_template_args(row, prompt),
    )


def responses_of(row: Mapping[str, Any], layout: RowColumns) -> list[dict[str, Any]]:
    """Split a row into one row per response, if it has several.

    Responses are a list of texts, or the assistant's turns of a conversation if all of
    these are wanted. Other lists as long as the texts (verdicts, finish reasons) are split
    along with them. The row's id gets a suffix: `#` and the response's number.
    """
    if layout.assistant_turns == "all":
        return _turns_of(row, layout)
    column = _response_column(row, layout)
    value = None if column is None else row[column]
    if column is None or not isinstance(value, list) or len(value) < 2:
        return [dict(row)]
    if not all(isinstance(text, str) for text in value):
        return [dict(row)]
    if not layout.response_field and _holds_answer(row, layout):
        return [dict(row)]
    parallel = {name for name, v in row.items() if isinstance(v, list) and len(v) == len(value)}
    rows = []
    for number in range(len(value)):
        one = {name: v[number] if name in parallel else v for name, v in row.items()}
        if row.get(layout.id_field) is not None:
            one[layout.id_field] = f"{row[layout.id_field]}#{number}"
        if one.get("finish_reason") is None and isinstance(one.get("finish_reasons"), str):
            one["finish_reason"] = one["finish_reasons"]
        rows.append(one)
    return rows


def _turns_of(row: Mapping[str, Any], layout: RowColumns) -> list[dict[str, Any]]:
    """Split a row into one row per assistant turn, each ending its conversation there."""
    names = (layout.prompt_field,) if layout.prompt_field else CHAT_COLUMNS
    column = next((name for name in names if row.get(name) is not None), None)
    if column is None:
        return [dict(row)]
    messages = messages_of(row[column], column)
    is_own = [message["role"] == "assistant" for message in messages]
    ends = [
        number + 1
        for number, own in enumerate(is_own)
        if own and number > 0 and not (number + 1 < len(is_own) and is_own[number + 1])
    ]
    if len(ends) < 2:
        return [dict(row)]
    given = row.get(layout.id_field)
    return [
        {
            **row,
            column: messages[:end],
            **({} if given is None else {layout.id_field: f"{given}#{number}"}),
        }
        for number, end in enumerate(ends)
    ]


def _holds_answer(row: Mapping[str, Any], layout: RowColumns) -> bool:
    """Whether a conversation of the row ends in the assistant's turn."""
    for name in CHAT_COLUMNS:
        value = row.get(name)
        if name != layout.prompt_field and layout.prompt_field is not None:
            continue
        last = value[-1] if isinstance(value, list) and value else None
        if isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt"):
            return True
    return False


def _only(value: object) -> object:
    """The text in a list of one text; other values unchanged."""
    is_one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if is_one and isinstance(value, list) else value


def _answer_of_messages(value: object, column: str) -> tuple[str, str | None]:
    """The text of an answer from a message, or from the choices of a server's response."""
    if isinstance(value, Mapping):
        body = value.get("body")
        value = (body if isinstance(body, Mapping) else value).get("choices", [value])
    if (
        isinstance(value, list)
        and value
        and isinstance(value[0], Mapping)
        and "message" in value[0]
    ):
        value = [choice.get("message") for choice in value if isinstance(choice, Mapping)]
    messages = messages_of(value, column)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRow(Reason.BAD_RESPONSE, f"`{column}` must be one message of the assistant")
    return messages[0]["content"], messages[0].get("reasoning_content")


def _prompt_column(row: Mapping[str, Any], layout: RowColumns) -> str:
    usual = (*CHAT_COLUMNS, "prompt")
    names = (layout.prompt_field,) if layout.prompt_field else usual
    for name in names:
        if row.get(name) is not None:
            return name
    questions = [name for name in QUESTION_COLUMNS if row.get(name) is not None]
    for name in questions if layout.prompt_field is None else []:
        if layout.apply_chat_template or isinstance(row[name], list):
            return name
    expected = " or ".join(f"`{name}`" for name in names)
    hint = "name yours with --prompt-field"
    if questions and layout.prompt_field is None:
        hint = f"`{questions[0]}` is used with --apply-chat-template; or {hint}"
    raise BadRow(Reason.UNKNOWN_COLUMNS, f"expected {expected}, found {_found(row)}; {hint}")


def _response_column(row: Mapping[str, Any], layout: RowColumns) -> str | None:
    names = (layout.response_field,) if layout.response_field else _RESPONSE_COLUMNS
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None and not layout.response_field and row.get("answer") is not None:
        # Often the reference; beside a chain of thought it is the answer to that.
        return "answer" if _reasoning_column(row, layout) is not None else None
    return found


def _reasoning_column(row: Mapping[str, Any], layout: RowColumns) -> str | None:
    if layout.reasoning_field:
        return layout.reasoning_field if row.get(layout.reasoning_field) is not None else None
    for name in (*REASONING_NAMES, *_REASONING_COLUMNS):
        value = _only(row.get(name))
        if isinstance(value, str) and value.strip().lower() not in _SWITCHES:
            return name
    return None


def _asked(
    row: Mapping[str, Any], column: str, layout: RowColumns
) -> tuple[str | list[Message], tuple[str, ...]]:
    """The prompt or conversation in a column, with its system prompt, and the columns used."""
    value = row[column]
    if isinstance(value, str) and column not in CHAT_COLUMNS:
        if not value.strip():
            raise BadRow(Reason.EMPTY_PROMPT, "the prompt is empty")
        if not layout.apply_chat_template:
            return value, (column,)
        value = [{"role": "user", "content": value}]
    elif not isinstance(value, list | str):
        raise BadRow(
            Reason.BAD_PROMPT,
            f"`{column}` must be text or a list of messages, got {type(value).__name__}",
        )
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name) is not None), None)
    messages = with_joined_turns(messages_of(value, column))
    messages = with_system(messages, system, drop=layout.drop_system)
    if not messages:
        raise BadRow(Reason.EMPTY_PROMPT, "the system prompt is the only message")
    return messages, (column, *SYSTEM_COLUMNS, "tools", TEMPLATE_ARGS_COLUMN)


def _tools(row: Mapping[str, Any], prompt: str | list[Message]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(prompt, str) or not tools:
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRow(Reason.BAD_MESSAGES, f"`tools` is not JSON: {error}") from error
    if not isinstance(tools, list):
        raise BadRow(Reason.BAD_MESSAGES, f"`tools` must be a list, got {type(tools).__name__}")
    return tools


def _template_args(row: Mapping[str, Any], prompt: str | list[Message]) -> Mapping[str, object]:
    """The row's own arguments for the chat template."""
    given = row.get(TEMPLATE_ARGS_COLUMN)
    if given is None or isinstance(prompt, str):
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                Reason.BAD_TEMPLATE_ARGS, f"`{TEMPLATE_ARGS_COLUMN}` is not JSON: {error}"
            ) from error
    if not isinstance(given, Mapping):
        raise BadRow(
            Reason.BAD_TEMPLATE_ARGS,
            f"`{TEMPLATE_ARGS_COLUMN}` must be an object, got {type(given).__name__}",
        )
    # A table has every key in every row; empty values mean nothing.
    return {name: value for name, value in given.items() if value not in (None, "", [], {})}


def _found(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(row)) or "nothing"
