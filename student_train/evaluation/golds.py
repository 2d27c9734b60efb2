"""Checks of golds before anything is generated: are they comparable and distinguishable?"""

import logging
from collections.abc import Sequence
from itertools import combinations

from student_train.evaluation.answers import final_answer
from student_train.evaluation.checker import Checker
from student_train.evaluation.prompts import Prompt

logger = logging.getLogger(__name__)

_NUM_PARSED = 200  # golds that are examined, spread over the set
_NUM_PAIRED = 24
_MOST_EQUAL = 0.2  # share of pairs


def check_golds(prompts: Sequence[Prompt], checker: Checker) -> None:
    """Refuse a set whose golds cannot tell a right answer from a wrong one.

    Raises:
        ValueError: If a gold is empty, if none is a number, a choice, a few words or mathematics,
            or if many different ones count as equal; each with an example.
    """
    different: dict[str, Prompt] = {}  # by what is compared
    for prompt in prompts:
        answer = final_answer(prompt.answer)
        if not answer:
            raise ValueError(
                f"{prompt.where}: the part of its `answer` {_short(prompt.answer)} that is "
                "compared is empty, so nothing can be right"
            )
        different.setdefault(answer, prompt)
    golds = list(different.values())
    _check_kinds(_spread(golds, _NUM_PARSED), checker)
    _check_pairs(_spread(golds, _NUM_PAIRED), checker)


def _check_kinds(golds: Sequence[Prompt], checker: Checker) -> None:
    texts = [prompt for prompt in golds if checker.kind(prompt.answer) == "text"]
    if not texts:
        return
    first = texts[0]
    if len(texts) == len(golds):
        raise ValueError(
            f"{first.where}: no `answer` here is a number, a choice, a few words or mathematics, "
            f"so only the same text word for word is right, e.g. {_short(first.answer)}. "
            "Give the final answer alone, in \\boxed{...} or after ####"
        )
    logger.info(
        "%d of %d examined golds match only as the same text, e.g. %s: %s",
        len(texts), len(golds), first.where, _short(first.answer),
    )  # fmt: skip


def _check_pairs(golds: Sequence[Prompt], checker: Checker) -> None:
    pairs = list(combinations(golds, 2))
    equal = [
        (one, other)
        for one, other in pairs
        if checker.check(final_answer(one.answer), other.answer).is_right
    ]
    if len(golds) > 2 and len(equal) > _MOST_EQUAL * len(pairs):
        one, other = equal[0]
        raise ValueError(
            f"{one.where}: {len(equal):,} of {len(pairs):,} pairs of different `answer`s count as "
            f"equal, so wrong answers would be right, e.g. {_short(one.answer)} and "
            f"{_short(other.answer)} ({other.where}). Give the final answers alone"
        )


def _spread(golds: Sequence[Prompt], number: int) -> Sequence[Prompt]:
    step = max(1, -(-len(golds) // number))
    return golds[::step]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:38]} ... {text[-38:]}")
