"""TurnLayout: what a teacher writes around its chain of thought, derived from its chat template.

There is no list of model families: conversations of sentinels are rendered with every
name that templates read reasoning under, and the text before, between and after the sentinels
is the layout. If a template drops the reasoning, its generation prompt, the marks at which it
cuts, and the tokenizer's own tokens decide; if nothing does, there are no marks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from teacher_cache.sources.chat_template import ChatTemplate
from teacher_cache.sources.marks import ThinkMarks, opening_before, pairs_among, tags_in
from teacher_cache.sources.probes import Probe, Shown

_OF_THINKING = re.compile("think|reason|effort", re.IGNORECASE)


class Prompt(StrEnum):
    """Effect of the generation prompt on a chain of thought."""

    LEAVES = "leaves it to the model"
    OPENS = "opens it"
    CLOSES = "closes it: thinking is off"


@dataclass(frozen=True)
class TurnLayout:
    """The assistant's turn as the teacher writes it: opener, reasoning, joint, answer, end.

    Attributes:
        source: Origin of this layout, in words.
        reads: Name under which the template reads reasoning, a key of `Probe.FIELDS`; None
            if it reads none.
        marks: Marks around a chain of thought; None if the teacher is not known to write one.
        opener: All text between the turn's header and the reasoning, white space included;
            None if unknown.
        joint: Likewise between reasoning and answer.
        end: Text that closes the turn, up to its end token; empty if it has none.
        prompt: Effect of the generation prompt.
        in_parts: Whether the template reads content only in parts, such as images and text.
        reveal: Arguments with which the template shows the reasoning of a last turn, and which
            leave the generation prompt unchanged.
        switches: Arguments that change the generation prompt, as `name=value: ...`.
    """

    source: str
    reads: str | None = None
    marks: ThinkMarks | None = None
    opener: str | None = None
    joint: str | None = None
    end: str = ""
    prompt: Prompt = Prompt.LEAVES
    in_parts: bool = False
    reveal: Mapping[str, object] = field(default_factory=dict)
    switches: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The layout as a cache's header stores it."""
        return {
            "source": self.source,
            "reads": self.reads,
            "think_open": None if self.marks is None else self.marks.open,
            "think_close": None if self.marks is None else self.marks.close,
            "opener": self.opener,
            "joint": self.joint,
            "end": self.end,
            "prompt": self.prompt.value,
            "switches": list(self.switches),
        }


def read_layout(
    template: ChatTemplate, arguments: Mapping[str, object], end_tokens: Sequence[str]
) -> TurnLayout:
    """Derive the layout of the assistant's turn from a chat template.

    Args:
        template: Chat template of the teacher.
        arguments: Arguments of the template.
        end_tokens: Tokens at which the teacher stops, from its generation config and tokenizer.

    Raises:
        TemplateRefusesError: If the template refuses a plain question.
    """
    known = [*template.added_tokens, *tags_in(template.source)]
    pairs = pairs_among(known)
    probe = Probe(template, arguments, pairs)
    shown, source = _ask(probe)
    if shown is not None:
        # A template may make its tags from parts: then only its text shows them whole.
        opener = _opener(probe, shown, [*known, *tags_in(shown.text)])
        joint = shown.joint
        close = _closing_mark(opener, joint, template.added_tokens)
        marks = ThinkMarks(opener.strip(), close, bool(joint.partition(close)[2].strip()))
        found = TurnLayout(source, shown.way, marks, opener, joint, reveal=shown.reveal)
    else:
        own = set(template.added_tokens)
        in_tokens = [marks for marks in pairs if marks.open in own and marks.close in own]
        cut_at = next((marks for marks in pairs if probe.cuts_at(marks)), None)
        marks_known = cut_at or (in_tokens[0] if len(in_tokens) == 1 else None)
        source = "the marks at which the template cuts" if cut_at else "the tokenizer's tokens"
        found = TurnLayout(source if marks_known else "nothing", marks=marks_known)
    found = replace(found, end=_end(probe, found, end_tokens), in_parts=probe.in_parts)
    prompt = prompt_state(probe.turn_header, found.marks)
    if found.opener is None and found.marks is not None and prompt is Prompt.OPENS:
        header = probe.turn_header
        found = replace(found, opener=header[header.rfind(found.marks.open) :])
    return replace(found, prompt=prompt, switches=_switches(probe, found.marks))


def prompt_state(header: str, marks: ThinkMarks | None) -> Prompt:
    """Effect of a generation prompt on a chain of thought.

    Args:
        header: Text that it adds to the conversation.
        marks: The teacher's marks.
    """
    if marks is None:
        return Prompt.LEAVES
    opened = header.rfind(marks.open) if marks.open else 0  # then every turn begins in it
    closed = header.rfind(marks.close)
    if opened > closed:
        return Prompt.OPENS
    return Prompt.CLOSES if closed >= 0 else Prompt.LEAVES


def _ask(probe: Probe) -> tuple[Shown | None, str]:
    """A rendering that shows the reasoning of a last turn, and how it was obtained."""
    shown = probe.find_shown({})
    if shown is not None:
        return shown, "the template"
    for name, values in probe.template.values_known.items():
        for value in values:
            shown = probe.find_shown({name: value})
            if shown is not None:
                return shown, f"the template with {_argument(name, value)}"
    return probe.find_before_call(), "the template, where a tool is called"


def _opener(probe: Probe, shown: Shown, known: Sequence[str]) -> str:
    """All text between the turn's header and the reasoning, wherever the generation prompt ends."""
    prompt = probe.prompt(shown.arguments)
    common = probe.common(shown.text, prompt)
    before = shown.text[common : shown.start]
    if common == len(prompt) and before.strip():
        return before  # the model writes it
    turn_start = len(prompt) - len(probe.header_of(prompt, shown.arguments))
    lead = shown.text[min(turn_start, common) : shown.start]
    partner = opening_before(lead, shown.joint.strip(), known)
    if partner >= 0:
        return lead[partner:]
    left = prompt[common:]
    if left.strip() and shown.joint.strip() not in left:
        return left  # the generation prompt's words begin the thought
    shared = [probe.common(lead, header) for header in probe.other_headers(lead)]
    return lead[max((n for n in shared if n < len(lead.rstrip())), default=len(lead)) :]


def _closing_mark(opener: str, joint: str, added_tokens: Sequence[str]) -> str:
    """The part of a joint that ends the chain of thought: its first unsplittable token.

    A mark may look like `<|close|>think<|sep|>`: then its name occurs in the opener too.
    """
    first = _first_token(joint, added_tokens)
    if first is None:
        return joint.strip()
    end = joint.find(first) + len(first)
    following = _first_token(joint[end:], added_tokens)
    if following is not None:
        name, _, _ = joint[end:].partition(following)
        if name.strip() and name.strip() in opener:
            end += len(name) + len(following)
    return joint[joint.find(first) : end]


def _first_token(text: str, added_tokens: Sequence[str]) -> str | None:
    places = [(text.find(token), -len(token), token) for token in added_tokens if token in text]
    return min(places)[2] if places else None


def _end(probe: Probe, found: TurnLayout, end_tokens: Sequence[str]) -> str:
    """Text after an answer, up to the token that ends the turn."""
    after = probe.after_answer(found.reads, found.reveal)
    known = [after.find(token) + len(token) for token in end_tokens if token and token in after]
    if known:
        return after[: min(known)]
    # A token that also stands between reasoning and answer ends a channel, not the turn.
    tokens = [token for token in probe.template.added_tokens if token not in (found.joint or "")]
    own = _first_token(after, tokens)
    if own is not None:
        return after[: after.find(own) + len(own)]
    following = probe.after_answer(found.reads, found.reveal, goes_on=True).lstrip()
    begun = (token for token in end_tokens if token and following.startswith(token))
    return next(begun, end_tokens[0] if end_tokens else "")


def _switches(probe: Probe, marks: ThinkMarks | None) -> tuple[str, ...]:
    """Arguments that change the generation prompt."""
    found = []
    default = probe.prompt({})
    for name, values in probe.template.values_known.items():
        for value in values:
            prompt = probe.prompt_or_none({name: value})
            if prompt is None or prompt == default:
                continue
            state = prompt_state(probe.header_of(prompt, {name: value}), marks)
            is_same = state is prompt_state(probe.turn_header, marks)
            if is_same and not names_thinking(name):
                continue
            effect = "changes the prompt" if is_same else f"the generation prompt {state.value}"
            found.append(f"{_argument(name, value)}: {effect}")
    return tuple(found)


def names_thinking(argument: str) -> bool:
    """Whether an argument's name, with or without a value, is one of thinking."""
    return _OF_THINKING.search(argument.partition("=")[0]) is not None


def _argument(name: str, value: object) -> str:
    """An argument as `--template-arg` takes it."""
    return f"{name}={value if isinstance(value, str) else str(value).lower()}"


@dataclass(frozen=True)
class GivenMarks:
    """Texts around a chain of thought given by the user, white space included.

    Attributes:
        opener: All text between the turn's header and the reasoning.
        joint: All text between reasoning and answer.
    """

    opener: str
    joint: str

    def __post_init__(self) -> None:
        if not (self.opener.strip() and self.joint.strip()):
            raise ValueError(
                "thinking marks: expected text that is not blank for --think-open and "
                f"--think-close, got {self.opener!r} and {self.joint!r}"
            )

    def instead_of(
        self, found: TurnLayout, template: ChatTemplate, arguments: Mapping[str, object]
    ) -> TurnLayout:
        """A layout with these marks instead of the template's."""
        close = _closing_mark(self.opener, self.joint, template.added_tokens)
        marks = ThinkMarks(self.opener.strip(), close, bool(self.joint.partition(close)[2].strip()))
        prompt = found.prompt
        if template.source and not found.source.startswith("nothing:"):
            prompt = prompt_state(Probe(template, arguments, []).turn_header, marks)
        return replace(
            found,
            source="the options",
            marks=marks,
            opener=self.opener,
            joint=self.joint,
            prompt=prompt,
            reads=found.reads if (found.opener, found.joint) == (self.opener, self.joint) else None,
        )


def layout_lines(layout: TurnLayout) -> list[str]:
    """Readable summary of the layout, a line or two."""
    if layout.marks is None:
        return [f"chain of thought: no marks known ({layout.source}); end of turn {layout.end!r}"]
    unknown = "not known"
    opener = unknown if layout.opener is None else repr(layout.opener)
    joint = unknown if layout.joint is None else repr(layout.joint)
    turn = f"{opener} ... {joint} answer {layout.end!r}"
    if layout.opener is None and layout.joint is None:
        turn = f"{layout.marks.open!r} ... {layout.marks.close!r}; end of turn {layout.end!r}"
    lines = [
        f"chain of thought: {turn} (from {layout.source}); the generation prompt "
        f"{layout.prompt.value}"
    ]
    return lines + [f"  --template-arg {switch}" for switch in layout.switches]
