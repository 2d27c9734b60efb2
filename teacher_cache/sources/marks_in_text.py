"""Thinking marks in text: a response as the teacher itself would have written it."""

from dataclasses import dataclass

from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.tokenizer import ThinkMarks

# Marks that data sets carry. OpenThoughts and Sky-T1 put the answer between marks, too.
KNOWN_MARKS = (
    ThinkMarks("<think>", "</think>"),
    ThinkMarks("<|begin_of_thought|>", "<|end_of_thought|>"),
)
SOLUTION_MARKS = ThinkMarks("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class Response:
    """What the assistant wrote, with the teacher's own marks."""

    text: str
    is_cut: bool  # it broke off, and has no end-of-turn token


def response_of(reasoning: str | None, answer: str, own: ThinkMarks) -> Response:
    """The text of a response whose chain of thought stands apart, between marks, or nowhere.

    Args:
        reasoning: Given apart; None or blank where it was not.
        answer: The answer, or all of the response.
        own: The marks that the teacher writes.

    Raises:
        BadRow: If the marks are out of order, or given twice over.
    """
    if reasoning is None or not reasoning.strip():
        return with_own_marks(answer, own)
    if own.open in reasoning or own.close in reasoning:
        raise BadRow(
            Reason.MARKS_OUT_OF_ORDER, "the reasoning given apart holds thinking marks itself"
        )
    if answer.lstrip().startswith(tuple(marks.open for marks in (own, *KNOWN_MARKS))):
        raise BadRow(
            Reason.MARKS_OUT_OF_ORDER,
            "a chain of thought is given twice, apart and between marks in the response",
        )
    reasoning = reasoning.strip("\n")
    if not answer.strip():
        return Response(f"{own.open}\n{reasoning}", is_cut=True)
    return _answered(reasoning, answer, own)


def with_own_marks(text: str, own: ThinkMarks) -> Response:
    """A text with the teacher's marks in the place of those of a data set; others stay.

    Raises:
        BadRow: If a data set's marks are out of order.
    """
    begin = text.lstrip()
    foreign = [marks for marks in KNOWN_MARKS if marks != own]
    for marks in foreign:
        is_first = begin.startswith(marks.open)
        has_own = own.open in text or own.close in text
        if is_first or (not has_own and (marks.open in text or marks.close in text)):
            return _translated(text, marks, own)
    return Response(text, is_cut=False)


def _translated(text: str, marks: ThinkMarks, own: ThinkMarks) -> Response:
    before, opened, rest = text.partition(marks.open)
    if not opened:
        before, rest = "", text  # a template may have written the opening mark
    if before.strip():
        raise BadRow(Reason.MARKS_OUT_OF_ORDER, f"text stands before the opening mark {marks.open}")
    reasoning, closed, answer = rest.partition(marks.close)
    if not closed:
        return Response(f"{own.open}\n{reasoning.lstrip()}", is_cut=True)
    answer = answer.strip()
    is_cut = answer.startswith(SOLUTION_MARKS.open) and SOLUTION_MARKS.close not in answer
    answer = answer.removeprefix(SOLUTION_MARKS.open).removesuffix(SOLUTION_MARKS.close)
    whole = _answered(reasoning.strip(), answer.strip(), own)
    return Response(whole.text, is_cut)


def _answered(reasoning: str, answer: str, own: ThinkMarks) -> Response:
    answer = answer.lstrip("\n")
    return Response(f"{own.open}\n{reasoning}\n{own.close}\n\n{answer}", is_cut=False)


def continued(response: str, opened: str | None, own: ThinkMarks) -> str:
    """What of a response comes after a prompt.

    Args:
        response: All of it, with or without its opening mark.
        opened: The prompt's text from its opening mark on, where the template wrote one.
        own: The teacher's marks.

    Raises:
        BadRow: If the closing mark comes before the opening one, or nothing stands between them.
    """
    if opened is not None:
        begin = response.lstrip()
        if begin.startswith(opened):  # mark and line break
            response = begin.removeprefix(opened)
        elif begin.startswith(own.open):
            response = begin.removeprefix(own.open)
    open_at, close_at = response.find(own.open), response.find(own.close)
    if opened is None and 0 <= close_at < open_at:
        raise BadRow(Reason.MARKS_OUT_OF_ORDER, f"{own.close} stands before {own.open}")
    if opened is None and open_at < 0 and close_at < 0:
        return response  # no chain of thought
    start = 0 if opened is not None or open_at < 0 else open_at + len(own.open)
    if not response[start : close_at if close_at >= 0 else None].strip():
        raise BadRow(Reason.EMPTY_CHAIN_OF_THOUGHT, "nothing stands between the thinking marks")
    return response
