"""A chain of thought between marks in a response's text: the teacher's own, or a data set's."""

from dataclasses import dataclass, replace

from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.turn_layout import Prompt, TurnLayout

# Marks used by data sets. OpenThoughts and Sky-T1 also put the answer between marks.
DATA_MARKS = (
    ThinkMarks("<think>", "</think>"),
    ThinkMarks("<|begin_of_thought|>", "<|end_of_thought|>"),
)
SOLUTION_MARKS = ThinkMarks("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class Thought:
    """A response split into its sections.

    Attributes:
        reasoning: Chain of thought; empty if there is none.
        answer: Answer; empty if the response broke off in its chain of thought.
        is_cut: Whether the response broke off there, or in a data set's solution.
        is_empty: Whether the marks enclose nothing.
        verbatim: The whole response, if it is already the teacher's own text.
    """

    reasoning: str
    answer: str
    is_cut: bool = False
    is_empty: bool = False
    verbatim: str | None = None


def thought_in(
    reasoning: str | None,
    answer: str,
    layout: TurnLayout,
    *,
    is_cut: bool = False,
    calls_tools: bool = False,
) -> Thought:
    """Split a response whose chain of thought is a separate text, inside it, or missing.

    Args:
        reasoning: Separate chain of thought; None or blank if there is none.
        answer: The answer, or all of the response.
        layout: Layout of the teacher's turn after this prompt.
        is_cut: Whether the row says that the response broke off.
        calls_tools: Whether the turn continues with tool calls.

    Raises:
        BadRow: If the marks are out of order, or the chain of thought is given twice.
    """
    own = layout.marks
    if reasoning is None or not reasoning.strip():
        return _inside(answer, layout, is_cut=is_cut)
    if own is not None and own.close in reasoning:
        raise BadRow(Reason.MARKS_OUT_OF_ORDER, "the separate reasoning itself has thinking marks")
    if answer.lstrip().startswith(tuple(marks.open for marks in _marks(layout) if marks.open)):
        raise BadRow(
            Reason.MARKS_OUT_OF_ORDER,
            "a chain of thought is given twice, separately and between marks in the response",
        )
    return Thought(reasoning.strip("\n"), answer, is_cut=not answer.strip() and not calls_tools)


def foreign_thought(text: str, layout: TurnLayout) -> tuple[str, str]:
    """(reasoning, answer) of an earlier turn whose thinking is between a data set's marks.

    Raises:
        BadRow: If those marks are out of order.
    """
    if layout.marks is not None and text.lstrip().startswith(layout.marks.open.lstrip()):
        return "", text
    foreign = replace(layout, marks=None, prompt=Prompt.LEAVES)
    if layout.marks in DATA_MARKS:
        others = [marks for marks in DATA_MARKS if marks != layout.marks]
        if not any(text.lstrip().startswith(marks.open) for marks in others):
            return "", text
    thought = _inside(text, foreign, is_cut=False)
    return thought.reasoning, thought.answer


def _marks(layout: TurnLayout) -> list[ThinkMarks]:
    """Marks to look for, the teacher's own first."""
    own = [] if layout.marks is None else [layout.marks]
    known = {(marks.open, marks.close) for marks in own}
    return own + [marks for marks in DATA_MARKS if (marks.open, marks.close) not in known]


def _inside(text: str, layout: TurnLayout, *, is_cut: bool) -> Thought:
    begin = text.lstrip()
    own = layout.marks
    for marks in _marks(layout):
        if marks.open and begin.startswith(marks.open.lstrip()):
            return _split(text, begin.removeprefix(marks.open.lstrip()), marks, layout, opens=True)
    for marks in _marks(layout):
        open_at, close_at = (text.find(mark) if mark else -1 for mark in (marks.open, marks.close))
        if close_at >= 0 and not (0 <= open_at < close_at) and not marks.is_channel:
            if open_at >= 0 and layout.prompt is not Prompt.OPENS:
                raise BadRow(Reason.MARKS_OUT_OF_ORDER, f"{marks.close} comes before {marks.open}")
            return _split(text, text, marks, layout, opens=False)
        if open_at >= 0 and marks is not own and marks.open != DATA_MARKS[0].open:
            raise BadRow(
                Reason.MARKS_OUT_OF_ORDER, f"text comes before the opening mark {marks.open}"
            )
    if is_cut and layout.prompt is Prompt.OPENS:
        return Thought(text, "", is_cut=True)
    return Thought("", text)


def _split(whole: str, text: str, marks: ThinkMarks, layout: TurnLayout, *, opens: bool) -> Thought:
    """Split a response that begins in its chain of thought; `text` lacks the opening mark."""
    if marks == layout.marks:
        verbatim = _own_text(whole, text, layout, opens=opens)
        if verbatim is not None:
            return verbatim
    reasoning, closed, answer = text.partition(marks.close)
    if not closed:
        return Thought(reasoning.lstrip(), "", is_cut=True)
    reasoning, answer = reasoning.strip(), answer.strip()
    is_cut = answer.startswith(SOLUTION_MARKS.open) and SOLUTION_MARKS.close not in answer
    if answer.startswith(SOLUTION_MARKS.open):
        answer = answer.removeprefix(SOLUTION_MARKS.open).removesuffix(SOLUTION_MARKS.close).strip()
    if not reasoning:
        _check_empty(answer, layout)
    return Thought(reasoning, answer, is_cut=is_cut, is_empty=not reasoning)


def _own_text(whole: str, text: str, layout: TurnLayout, *, opens: bool) -> Thought | None:
    """The response unchanged, if it has the teacher's layout or that layout is unknown.

    Args:
        whole: Response with its opening mark, if it has one.
        text: Response without it.
        layout: Layout of the teacher's turn.
        opens: Whether the response has an opening mark.
    """
    marks = layout.marks
    if marks is None or layout.prompt is Prompt.CLOSES:
        return None
    reasoning, closed, answer = text.partition(marks.close)
    if not reasoning.strip() and closed:
        return None
    if layout.prompt is Prompt.OPENS and opens:
        # The prompt already has the mark and the white space after it.
        behind = (layout.opener or "").partition(marks.open)[2]
        whole = text.removeprefix(behind)
    begun = "" if layout.prompt is Prompt.OPENS else layout.opener
    if begun is not None and layout.joint is not None:
        laid_out = begun + reasoning.strip()
        if closed:
            laid_out += layout.joint + answer.lstrip()
        if whole.rstrip() != laid_out.rstrip():
            return None  # another teacher's white space
    return Thought(reasoning.strip(), answer, is_cut=not closed, verbatim=whole)


def _check_empty(answer: str, layout: TurnLayout) -> None:
    """Refuse a chain of thought after an empty one, which no template writes."""
    if answer.lstrip().startswith(tuple(marks.open for marks in _marks(layout) if marks.open)):
        raise BadRow(
            Reason.MARKS_OUT_OF_ORDER, "a chain of thought follows an empty one in the response"
        )
