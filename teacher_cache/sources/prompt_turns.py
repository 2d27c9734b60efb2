"""Finds the tokens of a prompt that the assistant wrote, for any chat template."""

from collections.abc import Sequence

from teacher_cache.sources.conversations import Conversation, Message
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.sources.trace import TokenRanges

_STAND_IN = "leadspan0stand0in"  # replaces a message, to see where it is rendered


def tokens_of_others(
    conversation: Conversation, ids: Sequence[int], tokenizer: TeacherTokenizer
) -> TokenRanges:
    """Token ranges of a rendered conversation that are not the assistant's, template included.

    An assistant's turn extends from the end of the template's own opening to its end-of-turn
    token; without such a token, to the next message's text.

    Args:
        conversation: The conversation as rendered.
        ids: Token ids of its text.
        tokenizer: The teacher's tokenizer.

    Raises:
        BadRow: If the template moves or changes the messages around an assistant's turn.
    """
    others: list[tuple[int, int]] = []
    position = 0
    messages = conversation.messages
    runs = _assistant_runs(messages)
    if not runs:
        return ((0, len(ids)),)
    text = conversation.prompt()
    offsets = tokenizer.offsets(text)
    for first, after in runs:
        _, before_end = _place_of(first - 1, conversation, text)
        next_start, _ = _place_of(after, conversation, text)
        before = conversation.with_messages(messages[:first])
        start_char = before_end + _opening_length(before, text[before_end:])
        # A token that only begins like the opening is the assistant's.
        own = [t for t, (_, end) in enumerate(offsets) if start_char < end <= next_start]
        ends = [t for t in own if ids[t] in tokenizer.terminal_ids]
        if own:
            others.append((position, own[0]))
            position = (ends or own)[-1] + 1
    return (*(span for span in others if span[0] < span[1]), (position, len(ids)))


def _assistant_runs(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """(first, end) of each run of assistant messages between two others."""
    runs, first = [], None
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            first = number if first is None else first
        elif first is not None:
            if first > 0:
                runs.append((first, number))
            first = None
    return runs


def _place_of(number: int, conversation: Conversation, text: str) -> tuple[int, int]:
    """Character range of a message's content in the rendered text."""
    other = _replaced(conversation, number).prompt()
    start = other.find(_STAND_IN)
    after = other[start + len(_STAND_IN) :]
    end = len(text) - len(after)
    if start < 0 or end < start or text[:start] != other[:start] or text[end:] != after:
        raise BadRow(
            Reason.TURNS_NOT_FOUND,
            f"message {number + 1} is not found in the chat template's rendering; "
            "--prompt-turns all needs no places of messages",
        )
    return start, end


def _opening_length(before: Conversation, text: str) -> int:
    """Number of characters of `text` with which the template opens the assistant's turn."""
    opening = _replaced(before, len(before.messages) - 1).prompt().partition(_STAND_IN)[2]
    pairs = zip(opening, text, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(opening), len(text)))


def _replaced(conversation: Conversation, number: int) -> Conversation:
    return conversation.with_messages(
        [
            {**message, "content": _STAND_IN} if other == number else message
            for other, message in enumerate(conversation.messages)
        ]
    )
