"""Conversations of any make as messages that a chat template takes."""

import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.sources.marks_in_text import with_own_marks
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.tokenizer import TeacherTokenizer, ThinkMarks

Message = dict[str, Any]

# ShareGPT's names. A function call is the assistant's own text there.
_ROLE_OF_SENDER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


def messages_of(value: object, column: str) -> list[Message]:
    """The messages of a conversation: `role` and `content`, or ShareGPT's `from` and `value`.

    Values that are null are left out, as a table has every key in every row. Content in parts is
    joined; reasoning, whatever its name, stands in `reasoning_content`.

    Args:
        value: What stands in the row: a list, or JSON of one.
        column: Where, for the error.

    Raises:
        BadRow: If it is no conversation.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                Reason.BAD_MESSAGES, f"`{column}` is text, but not JSON of a list: {error}"
            ) from error
    if not isinstance(value, list) or not value:
        raise BadRow(Reason.BAD_MESSAGES, f"`{column}` must be a list of at least one message")
    messages = [_message(item) for item in value]
    if all(not message["content"] and not message.get("reasoning_content") for message in messages):
        raise BadRow(Reason.EMPTY_PROMPT, "the prompt is empty: no message has content")
    return messages


def _message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(Reason.BAD_MESSAGES, "every message must be an object with `role` or `from`")
    message = {str(name): value for name, value in item.items() if value is not None}
    if isinstance(message.get("role"), str):
        # OpenAI's form has null beside a call, and templates ask for that.
        content = message.get("content", None if message.get("tool_calls") else "")
    elif isinstance(message.get("from"), str):
        sender = message.pop("from")
        if sender not in _ROLE_OF_SENDER:
            raise BadRow(
                Reason.UNKNOWN_ROLE,
                f"no role for `from` {sender!r}; known are {', '.join(_ROLE_OF_SENDER)}",
            )
        message["role"] = _ROLE_OF_SENDER[sender]
        content = message.pop("value", "")
    else:
        raise BadRow(
            Reason.BAD_MESSAGES, "every message must be an object with a `role` or a `from`"
        )
    named = [message.pop(name) for name in REASONING_NAMES if name in message]
    if not all(isinstance(text, str) for text in named):
        raise BadRow(Reason.BAD_MESSAGES, "the reasoning of a message must be text")
    message["content"], thought = _joined_parts(content)
    reasoning = next(filter(None, named), thought)  # several names are one text
    if reasoning or named:
        message["reasoning_content"] = reasoning
    return message


def _joined_parts(content: object) -> tuple[str | None, str]:
    """A message's content as text, and the thinking that stands in parts of it."""
    if isinstance(content, str | None):
        return content, ""
    if not isinstance(content, list):
        raise BadRow(
            Reason.BAD_MESSAGES, f"a message's content must be text, got {type(content).__name__}"
        )
    texts: dict[str, list[str]] = {"text": [], "thinking": [], "reasoning": []}
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in texts or not isinstance(part.get(kind), str):
            raise BadRow(
                Reason.BAD_MESSAGES,
                f"expected parts of type text or thinking in a message's content, got {kind!r}",
            )
        texts[kind].append(part[kind])
    return "".join(texts["text"]), "\n".join(texts["thinking"] + texts["reasoning"])


def with_system(messages: list[Message], system: object, *, drop: bool) -> list[Message]:
    """The messages after a system prompt that stands in a column of its own, or without any.

    Raises:
        BadRow: If there are two system prompts that differ.
    """
    own = [message["content"] for message in messages if message["role"] == "system"]
    if drop:
        return [message for message in messages if message["role"] != "system"]
    if not isinstance(system, str) or not system.strip() or own == [system]:
        return messages
    if own:
        raise BadRow(Reason.BAD_MESSAGES, "the `system` column and a system message differ")
    return [{"role": "system", "content": system}, *messages]


def rendered(messages: list[Message], tools: list[Any] | None, tokenizer: TeacherTokenizer) -> str:
    """The chat template's text of a conversation; raises BadRow where it refuses the messages."""
    try:
        return tokenizer.render_chat(messages, tools)
    except ValueError as error:
        raise BadRow(Reason.TEMPLATE_REFUSES, str(error)) from error


def with_own_history(messages: list[Message], own: ThinkMarks) -> list[Message]:
    """Earlier turns of the assistant with the teacher's own marks, for its template to treat."""
    return [
        _in_own_marks(message, own) if message["role"] == "assistant" else message
        for message in messages
    ]


def _in_own_marks(message: Message, own: ThinkMarks) -> Message:
    turn = dict(message)
    if turn["content"]:
        turn["content"] = with_own_marks(turn["content"], own).text
    if not turn.get("reasoning_content"):
        turn.pop("reasoning_content", None)  # templates look for marks only where there is none
    return turn
