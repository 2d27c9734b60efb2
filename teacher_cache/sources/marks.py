"""Marks around a chain of thought: what they are, and which names belong together."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# How the closing one of two marks is called after the opening one.
_PAIRED = (
    ("<", "</"), ("[", "[/"), ("◁", "◁/"), ("<|", "<|/"), ("<|", "</|"),
    ("start", "end"), ("START", "END"), ("begin", "end"), ("BEGIN", "END"), ("open", "close"),
)  # fmt: skip
_OF_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
# Tags as they stand in the text of chat templates.
_TAG = re.compile(r"</?[^<>\s'\"{}]{1,40}>|\[/?[^\[\]\s'\"{}]{1,40}\]|◁[^◁▷\s]{1,40}▷")


@dataclass(frozen=True)
class ThinkMarks:
    """The texts around a chain of thought, without the white space that stands beside them.

    Attributes:
        open: Begins it; empty where a chain of thought begins a turn with no mark.
        close: Ends it.
        is_channel: Whether a header of the answer follows the closing mark, so that the mark by
            itself does not tell a chain of thought from another part of the turn.
    """

    open: str
    close: str
    is_channel: bool = False


def closing_names(opening: str) -> list[str]:
    """What the mark that closes after `opening` may be called."""
    return [opening.replace(*pair, 1) for pair in _PAIRED if pair[0] in opening]


def pairs_among(names: Iterable[str]) -> list[ThinkMarks]:
    """Marks of a chain of thought among these names, in their order."""
    known = list(dict.fromkeys(names))
    return [
        ThinkMarks(name, other)
        for name in known
        if _OF_THOUGHT.search(name)
        for other in closing_names(name)
        if other in known and other != name
    ]


def tags_in(source: str) -> list[str]:
    """Tags that a chat template's text mentions, in their order."""
    return _TAG.findall(source)


def opening_before(lead: str, close: str, known: Iterable[str]) -> int:
    """Where the partner of a closing mark last stands in `lead`; -1 where it does not."""
    partners = {name for name in known if close in closing_names(name)}
    return max((lead.rfind(name) for name in partners), default=-1)
