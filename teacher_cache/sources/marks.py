"""Marks around a chain of thought: their texts, and which names belong together."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Names of the closing mark of a pair, derived from the opening one's.
_PAIRED = (
    ("<", "</"), ("[", "[/"), ("◁", "◁/"), ("<|", "<|/"), ("<|", "</|"),
    ("start", "end"), ("START", "END"), ("begin", "end"), ("BEGIN", "END"), ("open", "close"),
)  # fmt: skip
_OF_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
# Tags as they appear in the text of chat templates.
_TAG = re.compile(r"</?[^<>\s'\"{}]{1,40}>|\[/?[^\[\]\s'\"{}]{1,40}\]|◁[^◁▷\s]{1,40}▷")


@dataclass(frozen=True)
class ThinkMarks:
    """The texts around a chain of thought, without the white space next to them.

    Attributes:
        open: Opening mark; empty if a chain of thought starts a turn without a mark.
        close: Closing mark.
        is_channel: Whether the answer's header follows the closing mark, so that the mark by
            itself does not tell a chain of thought from another part of the turn.
    """

    open: str
    close: str
    is_channel: bool = False


def closing_names(opening: str) -> list[str]:
    """Possible names of the mark that closes after `opening`."""
    return [opening.replace(*pair, 1) for pair in _PAIRED if pair[0] in opening]


def pairs_among(names: Iterable[str]) -> list[ThinkMarks]:
    """Marks of a chain of thought among these names, in order."""
    known = list(dict.fromkeys(names))
    return [
        ThinkMarks(name, other)
        for name in known
        if _OF_THOUGHT.search(name)
        for other in closing_names(name)
        if other in known and other != name
    ]


def tags_in(source: str) -> list[str]:
    """Tags that a chat template's text mentions, in order."""
    return _TAG.findall(source)


def opening_before(lead: str, close: str, known: Iterable[str]) -> int:
    """Last position in `lead` of a closing mark's partner; -1 if it is missing."""
    partners = {name for name in known if close in closing_names(name)}
    return max((lead.rfind(name) for name in partners), default=-1)
