"""Converts conversations of any format to messages for a chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from teacher_cache.sources.chat_template import ChatTemplate, TemplateRefusesError
from teacher_cache.sources.marks_in_text import foreign_thought
from teacher_cache.sources.probes import FIELDS, IN_CONTENT, as_parts, header_after
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.turn_layout import TurnLayout

Message = dict[str, Any]

# ShareGPT's names. There, a function call is the assistant's own text.
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

    Null values are left out, because a table has every key in every row. Content in parts is
    joined; reasoning, whatever its name, is moved to `reasoning_content`.

    Args:
        value: The row's value: a list, or JSON of one.
        column: Name of the column, for errors.

    Raises:
        BadRow: If it is not a conversation.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                Reason.BAD_MESSAGES, f"`{column}` is text but not JSON of a list: {error}"
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
        # OpenAI's format has null beside a call, and templates check for that.
        content = message.get("content", None if message.get("tool_calls") else "")
    elif isinstance(message.get("from"), str):
        sender = message.pop("from")
        if sender not in _ROLE_OF_SENDER:
            raise BadRow(
                Reason.UNKNOWN_ROLE,
                f"no role for `from` {sender!r}; known names are {', '.join(_ROLE_OF_SENDER)}",
            )
        message["role"] = _ROLE_OF_SENDER[sender]
        content = message.pop("value", "")
    else:
        raise BadRow(
            Reason.BAD_MESSAGES, "every message must be an object with a `role` or a `from`"
        )
    _take_apart(message)
    content = message.get("content", content)
    named = [message.pop(name) for name in REASONING_NAMES if name in message]
    if not all(isinstance(text, str) for text in named):
        raise BadRow(Reason.BAD_MESSAGES, "the reasoning of a message must be text")
    message["content"], thought = _joined_parts(content)
    reasoning = next(filter(None, named), thought)  # several names may hold one text
    if reasoning or named:
        message["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        message["tool_calls"] = parsed_calls(message["tool_calls"])
    return message


def _take_apart(message: Message) -> None:
    """Move reasoning found elsewhere in a message to where it is expected."""
    info = message.get("info")
    if isinstance(info, Mapping) and isinstance(info.get("answer_content"), str):
        # AM-DeepSeek-R1: the content repeats it between marks of its own.
        message["content"] = info["answer_content"]
        message["reasoning_content"] = info.get("think_content") or ""
    message.pop("info", None)
    details = message.pop("reasoning_details", None)  # as OpenRouter writes it
    if isinstance(details, list) and not any(message.get(name) for name in REASONING_NAMES):
        texts = [part.get("text") or part.get("summary") for part in details if _is_object(part)]
        shown = [text for text in texts if isinstance(text, str)]
        if details and not shown:
            raise BadRow(
                Reason.BAD_MESSAGES,
                "the message's `reasoning_details` have no text: its reasoning is encrypted",
            )
        message["reasoning_content"] = "".join(shown)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _joined_parts(content: object) -> tuple[str | None, str]:
    """A message's content as text, and the thinking in parts of it."""
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
    return "\n".join(texts["text"]), "\n".join(texts["thinking"] + texts["reasoning"])


def with_system(messages: list[Message], system: object, *, drop: bool) -> list[Message]:
    """Messages with the system prompt of a separate column in front, or without any.

    Raises:
        BadRow: If there are two different system prompts.
    """
    own = [message["content"] for message in messages if message["role"] == "system"]
    if drop:
        return [message for message in messages if message["role"] != "system"]
    if not isinstance(system, str) or not system.strip() or own == [system]:
        return messages
    if own:
        raise BadRow(Reason.BAD_MESSAGES, "the `system` column and a system message differ")
    return [{"role": "system", "content": system}, *messages]


def with_joined_turns(messages: Sequence[Message]) -> list[Message]:
    """The messages with each turn of the assistant as one.

    Channels are separate messages: those that only think, before the one that answers, are its
    reasoning.

    Raises:
        BadRow: If several messages of one turn contain an answer.
    """
    joined: list[Message] = []
    for role, group in groupby(messages, key=lambda message: message["role"]):
        turns = list(group)
        joined += [_one_turn(turns)] if role == "assistant" else turns
    return joined


def _one_turn(messages: Sequence[Message]) -> Message:
    *thinking, last = messages
    thoughts = [_only_thought(message) for message in thinking]
    if any(thought is None for thought in thoughts):
        raise BadRow(
            Reason.BAD_MESSAGES,
            f"{len(messages)} messages in a row are the assistant's, and more than one answers; "
            "only messages that think may come before one that does",
        )
    if last.get("channel") == "analysis":
        last = {**last, "content": "", "reasoning_content": last["content"]}
    own = last.get("reasoning_content")
    reasoning = "\n".join([*filter(None, thoughts), *([own] if own else [])])
    return {**last, "reasoning_content": reasoning} if thoughts else last


def _only_thought(message: Message) -> str | None:
    """The reasoning of a message that does nothing else; None if it does more."""
    if message.get("tool_calls"):
        return None
    if message.get("channel") == "analysis":
        return "\n".join(filter(None, [message.get("reasoning_content"), message["content"]]))
    return None if message["content"] else message.get("reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """Messages before the assistant's turn, with everything else the chat template gets.

    Attributes:
        template: The teacher's chat template.
        layout: Layout of the assistant's turn with these arguments.
        messages: Messages from `messages_of`.
        tools: Tools that the template may describe.
        arguments: The user's arguments for all rows, and this row's.
    """

    template: ChatTemplate
    layout: TurnLayout
    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)

    def prompt(self) -> str:
        """The text up to the assistant's turn; raises BadRow if the template refuses."""
        try:
            return self._text(self.messages)
        except TemplateRefusesError as error:
            raise BadRow(Reason.TEMPLATE_REFUSES, str(error)) from error

    def header(self, prompt: str) -> str:
        """Text that the generation prompt adds; none of it comes from a message."""
        try:
            plain = self._text(self.messages, is_prompt=False)
        except TemplateRefusesError as error:
            raise BadRow(Reason.TEMPLATE_REFUSES, str(error)) from error
        last = self.messages[-1].get("content") or ""
        return header_after(prompt, plain, last, self.template.added_tokens)

    def answered(self, *turns: Message) -> str | None:
        """The text with further turns, closed; None if the template refuses them."""
        arguments = {**self.arguments, **self.layout.reveal}
        try:
            return self._text([*self.messages, *turns], arguments, is_prompt=False)
        except TemplateRefusesError:
            return None

    def with_messages(self, messages: Sequence[Message]) -> "Conversation":
        """A copy with other messages."""
        return replace(self, messages=messages)

    def _text(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, object] | None = None,
        *,
        is_prompt: bool = True,
    ) -> str:
        shaped = [for_template(message, self.layout) for message in messages]
        given = self.arguments if arguments is None else arguments
        return self.template.render(shaped, tools=self.tools, arguments=given, is_prompt=is_prompt)


def for_template(message: Message, layout: TurnLayout) -> Message:
    """A message with its reasoning under the name that the template reads.

    Reasoning between a data set's marks counts as reasoning; the teacher's marks in the content
    are left to the template. Reasoning that the template reads under no name is left
    out of earlier turns, as a server would.
    """
    turn = {name: value for name, value in message.items() if name != "reasoning_content"}
    reasoning, content = message.get("reasoning_content") or "", message.get("content")
    if message.get("role") == "assistant" and content and not reasoning:
        reasoning, content = foreign_thought(content, layout)
    turn["content"] = content
    if reasoning and layout.reads in FIELDS:
        turn |= FIELDS[layout.reads](reasoning, content or "")
    elif reasoning and layout.reads == IN_CONTENT and layout.marks is not None:
        turn["content"] = f"{layout.marks.open}{reasoning}{layout.marks.close}{content or ''}"
    return as_parts(turn) if layout.in_parts else turn


def parsed_calls(calls: object) -> list[Any]:
    """A turn's tool calls with their arguments as objects, as templates expect.

    Raises:
        BadRow: If arguments given as text are not a JSON object.
    """
    if not isinstance(calls, list):
        raise BadRow(
            Reason.BAD_MESSAGES, f"`tool_calls` must be a list, got {type(calls).__name__}"
        )
    return [_parsed_call(call) for call in calls]


def _parsed_call(call: object) -> object:
    if not isinstance(call, Mapping):
        raise BadRow(Reason.BAD_MESSAGES, "each of `tool_calls` must be an object")
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _parsed_call(inner)}
    given = call.get("arguments")
    if not isinstance(given, str):
        return dict(call)
    try:
        parsed = json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError) as error:
        raise BadRow(
            Reason.BAD_MESSAGES, f"the arguments of a tool call are text but not JSON: {error}"
        ) from error
    if not isinstance(parsed, dict):
        raise BadRow(
            Reason.BAD_MESSAGES,
            f"the arguments of a tool call must be an object, got {type(parsed).__name__}",
        )
    return {**call, "arguments": parsed}
