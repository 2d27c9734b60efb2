"""The checker of answers: plain comparison first, mathematics where that cannot decide."""

import importlib.metadata
from typing import Self

from student_train.evaluation.answers import final_answer
from student_train.evaluation.mathematics import (
    CPU_LIMIT_S,
    MEMORY_LIMIT_BYTES,
    Comparison,
    Mathematics,
)
from student_train.evaluation.numerals import readings
from student_train.evaluation.verdicts import (
    BEYOND_LIMITS,
    MAX_CHARACTERS,
    NO_ANSWER,
    Verdict,
    is_choice,
    is_sentence,
    is_words,
    plain_verdict,
)


class Checker:
    """Tells right answers from wrong ones; use it inside a `with` block.

    Raises:
        ModuleNotFoundError: If math-verify is not installed.
    """

    def __init__(self) -> None:
        self._mathematics = Mathematics()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._mathematics.__exit__(*error)

    @property
    def name(self) -> str:
        """The method of comparison, for the output: evaluations that share it are comparable."""
        version = importlib.metadata.version("math-verify")
        return (
            f"text, numbers, math-verify {version} ({CPU_LIMIT_S:g} s of CPU time and "
            f"{MEMORY_LIMIT_BYTES >> 30} GiB for each answer)"
        )

    def check(self, found: str | None, gold: str) -> Verdict:
        """Compare an answer, as found by `extract_answer`, with the gold as given."""
        if found is None:
            return NO_ANSWER
        gold = final_answer(gold)
        verdict = plain_verdict(found, gold)
        if verdict is not None:
            return verdict
        if max(len(found), len(gold)) > MAX_CHARACTERS:
            return BEYOND_LIMITS
        outcome = self._mathematics.compare(found, gold)
        if outcome is Comparison.BEYOND_LIMITS:
            return BEYOND_LIMITS
        return Verdict(outcome is Comparison.SAME, "mathematics")

    def kind(self, gold: str) -> str:
        """Kind that a gold is compared as; `text` where only the same text is right."""
        gold = final_answer(gold)
        if is_choice(gold):
            return "choice"
        if is_words(gold):
            return "words"
        if readings(gold).any:
            return "number"
        if is_sentence(gold) or len(gold) > MAX_CHARACTERS:
            return "text"
        same = self._mathematics.compare(gold, gold) is Comparison.SAME
        return "mathematics" if same else "text"
