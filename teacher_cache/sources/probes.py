"""Probe: renders conversations of sentinels to see how a chat template treats them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from teacher_cache.sources.chat_template import ChatTemplate, Message, TemplateRefusesError
from teacher_cache.sources.marks import ThinkMarks

QUESTION = "leadspan0question"
REASONING = "leadspan0reasoning"
ANSWER = "leadspan0answer"
_SOME_DAY = datetime(2000, 1, 1).strftime  # layouts do not depend on the date

ASKED: Message = {"role": "user", "content": QUESTION}
_CALL_NAME = "leadspan0call"
_CALLED: Message = {
    "type": "function", "id": "leadspan0", "function": {"name": _CALL_NAME, "arguments": {}}
}  # fmt: skip


def _apart(name: str) -> Callable[[str, str], dict[str, Any]]:
    return lambda reasoning, answer: {"content": answer, name: reasoning}


def _in_parts(reasoning: str, answer: str) -> dict[str, Any]:
    thought = {"type": "thinking", "thinking": reasoning}
    return {"content": [thought, {"type": "text", "text": answer}]}


# Ways for a message to hold its reasoning, by name.
FIELDS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "reasoning_content": _apart("reasoning_content"),
    "reasoning": _apart("reasoning"),
    "thinking": _apart("thinking"),
    "a part of type thinking": _in_parts,
}
IN_CONTENT = "marks in the content"


@dataclass(frozen=True)
class Shown:
    """A rendered conversation that shows the reasoning of the last turn."""

    way: str
    text: str
    start: int  # position of the reasoning
    joint: str
    arguments: Mapping[str, object]
    reveal: Mapping[str, object] = field(default_factory=dict)


class Probe:
    """A chat template with arguments, tested with sentinels.

    Args:
        template: Chat template to test.
        arguments: Arguments of every rendering, besides those of a single one.
        pairs: Marks that may enclose reasoning in a message's content.

    Raises:
        TemplateRefusesError: If the template refuses a plain question.
    """

    def __init__(
        self, template: ChatTemplate, arguments: Mapping[str, object], pairs: Sequence[ThinkMarks]
    ) -> None:
        self.template = template
        self.arguments = dict(arguments)
        self.pairs = pairs
        self.in_parts = False
        if QUESTION not in self.prompt({}):
            self.in_parts = QUESTION in self._render([as_parts(ASKED)], {})

    def prompt(self, more: Mapping[str, object]) -> str:
        """Render a question with the generation prompt."""
        return self._render([self._shaped(ASKED)], more)

    def prompt_or_none(self, more: Mapping[str, object]) -> str | None:
        """Like `prompt`, but None if the template refuses these arguments."""
        return self._try([self._shaped(ASKED)], more, is_prompt=True)

    def header_of(self, prompt: str, more: Mapping[str, object]) -> str:
        """Text that the generation prompt adds to a question."""
        plain = self._try([ASKED], more) or ""
        return header_after(prompt, plain, QUESTION, self.template.added_tokens)

    def common(self, one: str, other: str) -> int:
        """Length of the common start of two texts that splits no token of the tokenizer."""
        return common_length(one, other, self.template.added_tokens)

    @cached_property
    def turn_header(self) -> str:
        """Text that the generation prompt adds, with the arguments unchanged."""
        return self.header_of(self.prompt({}), {})

    @cached_property
    def earlier_header(self) -> str:
        """Text that opens an earlier assistant turn without reasoning; empty if unknown."""
        answered = {"role": "assistant", "content": ANSWER}
        text = self._try([ASKED, answered, ASKED], {}, is_prompt=True) or ""
        before, found, _ = text.partition(ANSWER)
        return before[self.common(self._try([ASKED], {}) or "", before) :] if found else ""

    def other_headers(self, lead: str) -> list[str]:
        """Texts that may open a turn without `lead`'s mark: an earlier turn, other arguments."""
        if self.earlier_header == lead:
            return [lead]
        found = [self.earlier_header]
        for name, values in self.template.values_known.items():
            for value in values:
                prompt = self.prompt_or_none({name: value})
                found += [] if prompt is None else [self.header_of(prompt, {name: value})]
        return found

    def find_shown(self, reveal: Mapping[str, object]) -> Shown | None:
        """The first way of giving reasoning that the template shows, if any."""
        prompt = self.prompt_or_none(reveal)
        is_neutral = prompt is not None and prompt == self.prompt({})
        for name, make in self._ways():
            text = self._try([ASKED, {"role": "assistant", **make(REASONING, ANSWER)}], reveal)
            start, end = _span(text)
            if text is None or start < 0 or _is_printed_as_data(text, start, end):
                continue
            joint = text[start + len(REASONING) : end]
            if not joint.strip():
                continue  # no closing mark
            if name == IN_CONTENT and not self._is_laid_out(make, joint, reveal):
                continue  # the input is only repeated, which tells nothing
            return Shown(name, text, start, joint, reveal, reveal if is_neutral else {})
        return None

    def find_before_call(self) -> Shown | None:
        """Like `find`, in a turn that calls a tool: some templates show reasoning only there."""
        call = {"tool_calls": [_CALLED]}
        bare = self._try([ASKED, {"role": "assistant", "content": "", **call}], {})
        for name, make in FIELDS.items():
            said = self._try([ASKED, {"role": "assistant", **make(REASONING, ANSWER), **call}], {})
            start, end = _span(said)
            if said is not None and _is_printed_as_data(said, start, end):
                continue
            joint = "" if said is None or start < 0 else said[start + len(REASONING) : end]
            if said is not None and joint.strip() and _CALL_NAME not in joint:
                return Shown(name, said, start, joint, {})
            text = self._try([ASKED, {"role": "assistant", **make(REASONING, ""), **call}], {})
            if text is None or bare is None or REASONING not in text:
                continue
            start = text.find(REASONING)
            rest = text[start + len(REASONING) :]
            called = bare[self.common(text[:start], bare) :]
            if called and rest.endswith(called) and rest.removesuffix(called).strip():
                return Shown(name, text, start, rest.removesuffix(called), {})
        return None

    def cuts_at(self, marks: ThinkMarks) -> bool:
        """Whether the template drops text between such marks in a last turn's content."""
        content = f"{marks.open}{REASONING}{marks.close}{ANSWER}"
        text = self._try([ASKED, {"role": "assistant", "content": content}], {})
        return text is not None and ANSWER in text and REASONING not in text

    def after_answer(
        self, way: str | None, reveal: Mapping[str, object], *, goes_on: bool = False
    ) -> str:
        """Text that the template writes after an answer, at the end or up to the next question."""
        make = FIELDS.get(way or "")
        turn: dict[str, Any] = {"content": ANSWER} if make is None else make(REASONING, ANSWER)
        messages = [ASKED, {"role": "assistant", **turn}, *([ASKED] if goes_on else [])]
        text = self._try(messages, reveal) or self._try(
            [ASKED, {"role": "assistant", "content": ANSWER}], {}
        )
        after = (text or "").rpartition(ANSWER)[2]
        return after.partition(QUESTION)[0] if goes_on else after

    def _ways(self) -> list[tuple[str, Callable[[str, str], dict[str, Any]]]]:
        between = [
            (IN_CONTENT, lambda r, a, m=marks: {"content": f"{m.open}{r}{m.close}{a}"})
            for marks in self.pairs
        ]
        return [*FIELDS.items(), *between]

    def _is_laid_out(
        self,
        make: Callable[[str, str], dict[str, Any]],
        joint: str,
        reveal: Mapping[str, object],
    ) -> bool:
        """Whether the template puts its own white space around reasoning in the content."""
        spaced = make(f"\n \n{REASONING}\n \n", f"\n \n{ANSWER}")
        text = self._try([ASKED, {"role": "assistant", **spaced}], reveal)
        start, end = _span(text)
        return text is not None and text[start + len(REASONING) : end] == joint

    def _shaped(self, message: Message) -> Message:
        return as_parts(message) if self.in_parts else message

    def _render(
        self, messages: Sequence[Message], more: Mapping[str, object], *, is_prompt: bool = True
    ) -> str:
        return self.template.render(
            messages, arguments={**self.arguments, **more}, is_prompt=is_prompt, clock=_SOME_DAY
        )

    def _try(
        self, messages: Sequence[Message], more: Mapping[str, object], *, is_prompt: bool = False
    ) -> str | None:
        try:
            shaped = [self._shaped(message) for message in messages]
            return self._render(shaped, more, is_prompt=is_prompt)
        except TemplateRefusesError:
            return None


def as_parts(message: Message) -> dict[str, Any]:
    """A message whose content is in parts, as templates of vision models read it."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": content}]}


def _span(text: str | None) -> tuple[int, int]:
    """Positions of the reasoning and of the answer after it; (-1, -1) if not both in this order."""
    if text is None:
        return -1, -1
    start = text.find(REASONING)
    end = text.find(ANSWER, start + len(REASONING)) if start >= 0 else -1
    return (start, end) if end >= 0 else (-1, -1)


def _is_printed_as_data(text: str, start: int, end: int) -> bool:
    """Whether a template that does not support parts has printed a list of them."""
    around = text[max(0, start - 40) : max(start, end)]
    return any(quoted in around for quoted in ("'type':", '"type":', "'thinking':", '"thinking":'))


def header_after(prompt: str, plain: str, last_content: str, tokens: Sequence[str]) -> str:
    """Text that a generation prompt adds to a conversation.

    Args:
        prompt: Conversation with the generation prompt.
        plain: The same without; equal if a template always opens the assistant's turn.
        last_content: Content of the last message, which such a turn's header follows.
        tokens: Texts that must not be split.
    """
    if prompt == plain:
        found = last_content.strip()
        return prompt.rpartition(found)[2] if found and found in prompt else ""
    return prompt[common_length(plain, prompt, tokens) :]


def common_length(one: str, other: str, tokens: Sequence[str]) -> int:
    """Length of the common start of two texts that splits none of `tokens` in either."""
    if other.startswith(one):
        same = len(one)
    else:
        pairs = zip(one, other, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    for text in (one, other):
        if same == len(text):  # nothing is split at its end
            continue
        for token in tokens:
            first = text.find(token, max(0, same - len(token) + 1), same + len(token) - 1)
            if 0 <= first < same < first + len(token):
                return first
    return same
