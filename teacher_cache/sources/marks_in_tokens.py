"""Where a trace's sections begin: the thinking marks among its tokens."""

from bisect import bisect_left
from collections.abc import Sequence

from teacher_cache.sources.tokenizer import TeacherTokenizer


def find_first(ids: Sequence[int], mark: Sequence[int], start: int = 0) -> int:
    """Where `mark` first stands in `ids` at or after `start`; -1 where it does not."""
    while True:
        try:
            position = ids.index(mark[0], start)
        except ValueError:
            return -1
        if tuple(ids[position : position + len(mark)]) == tuple(mark):
            return position
        start = position + 1


def find_last(ids: Sequence[int], mark: Sequence[int]) -> int:
    """Where `mark` last stands in `ids`; -1 where it does not."""
    position = find_first(ids[::-1], mark[::-1])
    return -1 if position < 0 else len(ids) - position - len(mark)


def find_sections(
    ids: Sequence[int], num_prompt: int, tokenizer: TeacherTokenizer
) -> tuple[int, int]:
    """(cot_start, answer_start) of a trace whose response begins at `num_prompt`.

    The chain of thought begins with its opening mark, which a template may have put at the end of
    the prompt, and ends with the first closing mark of the response; without a closing mark it
    reaches to the end. A response without any mark has no chain of thought.
    """
    prompt, response = ids[:num_prompt], ids[num_prompt:]
    cot_start = left_open(prompt, tokenizer)
    closed = _end_of_first(response, tokenizer.close_ids, tokenizer.marks.close, tokenizer)
    if cot_start < 0:
        opened = _end_of_first(response, tokenizer.open_ids, tokenizer.marks.open, tokenizer)
        if opened < 0 and closed < 0:
            return num_prompt, num_prompt
        cot_start = num_prompt
    return cot_start, len(ids) if closed < 0 else num_prompt + closed


def left_open(prompt: Sequence[int], tokenizer: TeacherTokenizer) -> int:
    """Where the opening mark stands that the prompt does not close; -1 where there is none."""
    if len(tokenizer.open_ids) == len(tokenizer.close_ids) == 1:
        opened = find_last(prompt, tokenizer.open_ids)
        return opened if opened > find_last(prompt, tokenizer.close_ids) else -1
    text = tokenizer.decode(prompt)
    if text.rfind(tokenizer.marks.open) <= text.rfind(tokenizer.marks.close):
        return -1
    # The last token from which on the mark is still whole.
    return bisect_left(
        range(len(prompt)),
        True,
        key=lambda start: tokenizer.marks.open not in tokenizer.decode(prompt[start + 1 :]),
    )


def _end_of_first(
    ids: Sequence[int], mark_ids: Sequence[int], mark: str, tokenizer: TeacherTokenizer
) -> int:
    """The end of the first mark, in tokens; -1 where there is none.

    A mark of several tokens is looked for in the text: its last token may be merged with what
    follows, and then belongs to the mark.
    """
    if len(mark_ids) == 1:
        position = find_first(ids, mark_ids)
        return position + 1 if position >= 0 else -1
    if mark not in tokenizer.decode(ids):
        return -1
    return 1 + bisect_left(
        range(len(ids)), True, key=lambda last: mark in tokenizer.decode(ids[: last + 1])
    )
