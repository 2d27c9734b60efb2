"""Writes a row's response as the teacher itself would have written it after the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.sources.columns import Exchange
from teacher_cache.sources.conversations import Conversation, Message
from teacher_cache.sources.marks_in_text import Thought, thought_in
from teacher_cache.sources.probes import common_length
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.turn_layout import Prompt, TurnLayout, names_thinking

_HOW_TO_SAY = (
    "give what the teacher writes there with --think-open and --think-close, white space included "
    '(a configuration file can hold line breaks: think-close = "\\n</think>\\n\\n")'
)


@dataclass(frozen=True)
class Response:
    """Text after the prompt."""

    text: str
    is_cut: bool  # whether it broke off, without an end token
    has_thought: bool


def response_of(
    exchange: Exchange,
    conversation: Conversation | None,
    prompt: str,
    layout: TurnLayout,
    end_tokens: Sequence[str],
    *,
    is_cut: bool,
) -> Response:
    """The response of a row, with the teacher's own marks and end of turn.

    The template's own rendering of the turn is used if it continues the prompt and contains what
    the row has. Otherwise the layout's pieces are joined: the prompt is what the teacher
    sees, whatever its template makes of a finished turn.

    Args:
        exchange: The parsed row.
        conversation: Source of the rendered prompt; None if it is the row's own text.
        prompt: Text of the prompt.
        layout: Layout of the teacher's turn; `layout.prompt` describes this very prompt.
        end_tokens: Tokens that may end the turn.
        is_cut: Whether the row says that the response broke off.

    Raises:
        BadRow: If the row's chain of thought cannot be written as the teacher would.
    """
    answer = exchange.answer or ""
    for end in end_tokens:
        answer = answer.removesuffix(end) if end else answer
    has_text = answer.strip() or (exchange.reasoning or "").strip()
    if not has_text and not exchange.tool_calls:
        raise BadRow(Reason.EMPTY_RESPONSE, "the response is empty")
    calls_tools = bool(exchange.tool_calls)
    thought = thought_in(exchange.reasoning, answer, layout, is_cut=is_cut, calls_tools=calls_tools)
    if thought.verbatim is not None:
        end = "" if thought.is_cut or is_cut else layout.end
        return Response(thought.verbatim + end, thought.is_cut or is_cut, has_thought=True)
    _check_prompt(thought, layout)
    is_cut = is_cut or thought.is_cut
    if is_cut and not thought.answer.strip():
        begun = _opener_left(prompt, layout)
        return Response(begun + thought.reasoning, is_cut=True, has_thought=True)
    text = None
    if conversation is not None:
        turn = _as_message(thought, exchange.tool_calls)
        text = _rendered(conversation, turn, prompt, thought, layout, end_tokens)
    if text is None and exchange.tool_calls:
        raise BadRow(
            Reason.TOOL_CALLS,
            "the chat template's text of the last turn, with its `tool_calls`, does not continue "
            "the prompt; give that text as its content",
        )
    if text is None:
        text = _put_together(thought, prompt, layout)
        if conversation is not None and not thought.reasoning:
            text = _answer_opener(conversation, turn, prompt, layout) + text
    if is_cut:
        return Response(_without_end(text, thought.answer, layout), True, bool(thought.reasoning))
    has_thought = bool(thought.reasoning) or _writes_thought(text, layout)
    if thought.is_empty and not has_thought and layout.prompt is not Prompt.CLOSES:
        raise BadRow(
            Reason.EMPTY_CHAIN_OF_THOUGHT,
            "nothing is between the thinking marks, and the chat template writes none there",
        )
    return Response(text, is_cut=False, has_thought=has_thought)


def own_rendering(exchange: Exchange, conversation: Conversation, layout: TurnLayout) -> str | None:
    """The template's own text of a row's whole conversation; None if it refuses."""
    if layout.reads is None:  # the content is left as it is
        message: Message = {"role": "assistant", "content": exchange.answer}
        calls = {"tool_calls": exchange.tool_calls} if exchange.tool_calls else {}
        return conversation.answered({**message, **calls})
    thought = thought_in(
        exchange.reasoning,
        exchange.answer or "",
        layout,
        calls_tools=bool(exchange.tool_calls),
    )
    return conversation.answered(_as_message(thought, exchange.tool_calls))


def _check_prompt(thought: Thought, layout: TurnLayout) -> None:
    """Refuse a chain of thought that the generation prompt excludes, or a missing one."""
    if not thought.reasoning:
        return
    if layout.prompt is Prompt.CLOSES:
        allow = (Prompt.OPENS.value, Prompt.LEAVES.value)
        opens = [switch for switch in layout.switches if switch.endswith(allow)]
        opens.sort(key=lambda switch: (not names_thinking(switch), switch.endswith(allow[1])))
        hint = f" (--template-arg {opens[0].partition(':')[0]})" if opens else ""
        raise BadRow(
            Reason.THINKING_IS_OFF,
            f"the generation prompt closes the chain of thought, and the row has one{hint}",
        )
    if layout.marks is None:
        raise BadRow(
            Reason.MARKS_UNKNOWN,
            "the row has a chain of thought, and nothing shows how the teacher marks one: its chat "
            f"template shows none, its tokenizer has no such tokens; {_HOW_TO_SAY}",
        )
    needs_joint = not thought.is_cut and thought.answer.strip()
    lacks = layout.opener is None and layout.prompt is not Prompt.OPENS
    if lacks or (needs_joint and layout.joint is None):
        raise BadRow(
            Reason.MARKS_UNKNOWN,
            f"the chat template drops the reasoning of a turn, so that nothing shows what is "
            f"around {layout.marks.open} and {layout.marks.close}; {_HOW_TO_SAY}",
        )


def _as_message(thought: Thought, tool_calls: list[Any] | None) -> Message:
    message: Message = {"role": "assistant", "content": thought.answer}
    if thought.reasoning:
        message["reasoning_content"] = thought.reasoning
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message


def _rendered(
    conversation: Conversation,
    turn: Message,
    prompt: str,
    thought: Thought,
    layout: TurnLayout,
    end_tokens: Sequence[str],
) -> str | None:
    """Text that the template's rendering of a finished turn adds to the prompt; None if it cannot.

    It must begin with the prompt, and contain the reasoning and then the answer.
    """
    whole = conversation.answered(turn)
    if whole is None or not whole.startswith(prompt):
        return None
    text = whole[len(prompt) :]
    position = 0
    for part in (thought.reasoning.strip(), thought.answer.strip()):
        position = text.find(part, position)
        if position < 0:
            return None
        position += len(part)
    if not turn.get("tool_calls"):
        return _ended(text, position, layout.end, end_tokens)
    ends = [text.rfind(end) + len(end) for end in end_tokens if end and text.rfind(end) >= position]
    if ends:
        return text[: max(ends)]
    result: Message = {"role": "tool", "content": "", "name": "tool"}
    following = (conversation.answered(turn, result) or "")[len(whole.rstrip()) :].lstrip()
    return text + next((end for end in end_tokens if end and following.startswith(end)), "")


def _ended(text: str, answer_end: int, end: str, end_tokens: Sequence[str]) -> str:
    rest = text[answer_end:]
    if end and end.strip() in rest:
        return text[: answer_end + rest.find(end.strip()) + len(end.strip())]
    for token in end_tokens:
        if token and token in rest:
            return text[: answer_end + rest.find(token) + len(token)]
    return text[:answer_end] + end


def _without_end(text: str, answer: str, layout: TurnLayout) -> str:
    """The text of a turn that broke off in its answer."""
    place = text.rfind(answer.strip())
    return text[: place + len(answer.strip())] if place >= 0 else text.removesuffix(layout.end)


def _put_together(thought: Thought, prompt: str, layout: TurnLayout) -> str:
    if thought.reasoning:
        return (
            _opener_left(prompt, layout)
            + thought.reasoning
            + (layout.joint or "")
            + thought.answer.lstrip("\n")
            + layout.end
        )
    if layout.prompt is Prompt.OPENS and layout.marks is not None:
        off = [s for s in layout.switches if s.endswith(Prompt.CLOSES.value)]
        hint = f"; thinking is off with --template-arg {off[0].partition(':')[0]}" if off else ""
        raise BadRow(
            Reason.EMPTY_CHAIN_OF_THOUGHT,
            "the generation prompt opens a chain of thought"
            + (f" with {layout.marks.open}" if layout.marks.open else "")
            + f", but the row's is empty{hint}",
        )
    return thought.answer + layout.end


def _answer_opener(
    conversation: Conversation, turn: Message, prompt: str, layout: TurnLayout
) -> str:
    """Text that opens an answer after a thought that the generation prompt has closed.

    A finished turn without reasoning begins with it, if it has tokens of its own there: some
    templates put a mark before every answer, which the model then writes itself.
    """
    whole, answer = conversation.answered(turn) or "", turn["content"].strip()
    if layout.prompt is not Prompt.CLOSES or layout.marks is None or answer not in whole:
        return ""
    tokens = conversation.template.added_tokens
    before = whole[: whole.rfind(answer)]
    lead = before[common_length(before, prompt, tokens) :]
    is_thought = any(mark in lead for mark in (layout.marks.open, layout.marks.close) if mark)
    return lead if not is_thought and any(token in lead for token in tokens) else ""


def _opener_left(prompt: str, layout: TurnLayout) -> str:
    """The part of the opener that a prompt leaves to the model, such as a line break."""
    opener = layout.opener or ""
    if layout.prompt is not Prompt.OPENS:
        return opener
    written = next((n for n in range(len(opener), 0, -1) if prompt.endswith(opener[:n])), None)
    return "" if written is None else opener[written:]


def _writes_thought(text: str, layout: TurnLayout) -> bool:
    """Whether a turn without reasoning gets the template's empty chain of thought."""
    if layout.marks is None:
        return False
    begin = text.lstrip()
    opened = layout.prompt is Prompt.OPENS
    mark = layout.marks.close if opened else layout.marks.open
    return bool(mark) and begin.startswith(mark)
