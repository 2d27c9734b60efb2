r"""Verdicts on answers, as far as they need no symbolic mathematics.

| gold, or gold and answer              | verdict                                              |
| ------------------------------------- | ---------------------------------------------------- |
| the same text                         | right                                                |
| gold is a letter: `B`, `(B)`          | by the letter: `B`, `(B)`, `b)`, `B. Paris` are right |
| gold is words: `True`, `Evelyn`       | by the words, in either case; `Yes, because` is Yes  |
| numbers: `190.0`, `1,234`, `$18`      | by their exact values; commas separate thousands     |
|                                       | only where they can: `1,2` is a list, never 12       |
| `18 dollars` and `18`                 | right: units count only where both sides have one    |
| `50%` and `50`, or `0.5`              | right: golds omit the sign in either sense           |
| a number and a list                   | wrong                                                |
| the same list of numbers              | right; in another order mathematics decides          |
| `\frac12`, `3 1/2` and `0.5`, `7/2`   | by their exact values; where they differ mathematics |
|                                       | decides, which rounds to six decimals                |
| a sentence, and gold is a number      | by the last number in it                             |
| a sentence, and gold is anything else | wrong                                                |
| anything else                         | mathematics decides                                  |
"""

import re
from dataclasses import dataclass

from student_train.evaluation.numerals import Readings, last_quantity, readings

_CHOICE = re.compile(r"\(([A-J])\)|([A-J])")
_CHOSEN = re.compile(r"\(([A-Ja-j])\)(?:\s.*)?|([A-Ja-j])(?:[.):]\s?.*)?", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+){0,5}")
_SHORT_WORDS = frozenset({"no", "on", "up"})
_YES_AND_NO = frozenset({"true", "false", "yes", "no"})
_FIRST_WORD = re.compile(r"([A-Za-z]+)[,.;:!\n]")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
MAX_CHARACTERS = 1000  # of an answer that is looked at in any way beyond equality


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and the kind that it was compared as."""

    is_right: bool
    compared_as: str  # text, choice, words, number, list, sentence, mathematics; or why it was not


NO_ANSWER = Verdict(is_right=False, compared_as="no answer")
BEYOND_LIMITS = Verdict(is_right=False, compared_as="beyond limits")


def plain_verdict(found: str, gold: str) -> Verdict | None:
    """Compare two answers, both as `answers.final_answer` gives them.

    Returns:
        The verdict; None where mathematics has to decide.
    """
    if not found:
        return NO_ANSWER
    if found == gold:
        return Verdict(is_right=True, compared_as="text")
    if choice := _CHOICE.fullmatch(gold):
        chosen = _CHOSEN.fullmatch(found)
        letter = (chosen[1] or chosen[2]).upper() if chosen else None
        return Verdict(letter == (choice[1] or choice[2]), "choice")
    if is_words(gold):
        return Verdict(_same_words(found, gold), "words")
    if max(len(found), len(gold)) > MAX_CHARACTERS:
        return None
    given, wanted = readings(found), readings(gold)
    if given.any and wanted.any:
        return _compare_numbers(given, wanted)
    if is_sentence(found):
        number = last_quantity(found)
        same = bool(number and wanted.quantity and number.is_same(wanted.quantity))
        return Verdict(same, "sentence")
    return None


def is_choice(gold: str) -> bool:
    """Whether a gold is the letter of a choice."""
    return _CHOICE.fullmatch(gold) is not None


def is_words(text: str) -> bool:
    """Whether a text is a few words; short ones may be products of variables."""
    if _WORDS.fullmatch(text) is None:
        return False
    return len(text) > 2 or text.lower() in _SHORT_WORDS


def is_sentence(text: str) -> bool:
    """Whether a text is prose: words outside LaTeX commands."""
    return "\\" not in text and "$" not in text.strip("$") and len(_LONG_WORD.findall(text)) > 1


def _same_words(found: str, gold: str) -> bool:
    if gold.casefold() in _YES_AND_NO and (first := _FIRST_WORD.match(found)):
        found = first[1]
    return " ".join(found.casefold().split()) == " ".join(gold.casefold().split())


def _compare_numbers(given: Readings, wanted: Readings) -> Verdict | None:
    one, other = given.quantity, wanted.quantity
    if one and other and one.is_same(other):
        return Verdict(is_right=True, compared_as="number")
    brackets = {given.brackets, wanted.brackets}
    if given.lists & wanted.lists and (len(brackets) == 1 or "" in brackets):
        return Verdict(is_right=True, compared_as="list")
    if given.lists and wanted.lists:
        return None  # sets have no order
    if one and other and not ((one.is_decimal and other.is_decimal) or one.unit or other.unit):
        return None
    return Verdict(is_right=False, compared_as="number" if one and other else "list")
