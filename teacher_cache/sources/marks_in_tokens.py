"""Finds where a trace's sections begin, from the thinking marks among a response's tokens."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.tokenizer import TeacherTokenizer


def find_first(ids: Sequence[int], mark: Sequence[int], start: int = 0) -> int:
    """First position of `mark` in `ids` at or after `start`; -1 if missing."""
    while True:
        try:
            position = ids.index(mark[0], start)
        except ValueError:
            return -1
        if tuple(ids[position : position + len(mark)]) == tuple(mark):
            return position
        start = position + 1


def find_last(ids: Sequence[int], mark: Sequence[int]) -> int:
    """Last position of `mark` in `ids`; -1 if missing."""
    position = find_first(ids[::-1], mark[::-1])
    return -1 if position < 0 else len(ids) - position - len(mark)


def find_sections(
    ids: Sequence[int],
    num_prompt: int,
    opened_at: int | None,
    marks: ThinkMarks | None,
    tokenizer: TeacherTokenizer,
) -> tuple[int, int]:
    """(cot_start, answer_start) of a trace whose response begins at `num_prompt`.

    The chain of thought begins with its opening mark, which the generation prompt may have
    written, and ends with the response's first closing mark; without a closing mark it
    extends to the end. Marks in the prompt's own text, and those that a response mentions after
    a different start, are ignored. A response with a closing mark but no opening one has a
    chain of thought too, if the closing mark has no other use.

    Args:
        ids: Token ids of the whole trace.
        num_prompt: Tokens of the prompt.
        opened_at: Token where the generation prompt opens a chain of thought; None if it does not.
        marks: The teacher's marks; None if it is not known to write a chain of thought.
        tokenizer: The teacher's tokenizer.
    """
    response = ids[num_prompt:]
    if marks is None or not response:
        start = num_prompt if opened_at is None else opened_at
        return start, len(ids) if opened_at is not None else start
    closed = _end_of_first(response, marks.close, tokenizer)
    if opened_at is not None:
        return opened_at, len(ids) if closed < 0 else num_prompt + closed
    num_thought = closed if closed >= 0 else _HEAD_TOKENS
    head = tokenizer.decode(response[: min(num_thought, _HEAD_TOKENS)]).lstrip()
    if marks.open and head.startswith(marks.open.lstrip()):
        return num_prompt, len(ids) if closed < 0 else num_prompt + closed
    if closed < 0 or marks.is_channel or marks.open in tokenizer.decode(response[:closed]):
        return num_prompt, num_prompt
    return num_prompt, num_prompt + closed


_HEAD_TOKENS = 64  # an opening mark is shorter


def opening_token(prompt: Sequence[int], mark: str, tokenizer: TeacherTokenizer) -> int:
    """Token position of the last opening mark in a prompt that is known to have one.

    A prompt that opens a chain of thought without a mark does so at its end.
    """
    if not mark:
        return len(prompt)
    mark_ids = tokenizer.encode(mark)
    if len(mark_ids) == 1 and mark_ids[0] in prompt:
        return find_last(prompt, mark_ids)
    # The last token from which the mark is still complete.
    return bisect_left(
        range(len(prompt)),
        True,
        key=lambda start: mark not in tokenizer.decode(prompt[start + 1 :]),
    )


def _end_of_first(ids: Sequence[int], mark: str, tokenizer: TeacherTokenizer) -> int:
    """End of the first mark, in tokens; -1 if there is none.

    A mark of several tokens is searched in the text: its last token may be merged with what
    follows, and then belongs to the mark.
    """
    mark_ids = _ids_of(mark, tokenizer)
    if len(mark_ids) == 1:
        position = find_first(ids, mark_ids)
        return position + 1 if position >= 0 else -1
    if mark not in tokenizer.decode(ids):
        return -1
    return 1 + bisect_left(
        range(len(ids)), True, key=lambda last: mark in tokenizer.decode(ids[: last + 1])
    )


@lru_cache(maxsize=8)  # asked for with every trace
def _ids_of(mark: str, tokenizer: TeacherTokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(mark))
