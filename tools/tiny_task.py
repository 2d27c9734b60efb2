"""The synthetic task of the tiny teacher: a sum of prices, added up column by column.

A prompt such as ``Sum of $85 $79 $26?`` asks for a total. The trace writes the prices down and
adds one after the other, units first, writing every carry and the prices left to add::

    <think>
    Start with $85 $79 $26.
    Next $79 + $85: 9+5=14, 7+8+1=16, so 164 left $26.
    Then 164 + $26: 4+6=10, 6+2+1=9, 1+0=1, makes 190.
    </think>
    190

Which summand comes first and the wording are free, so a teacher sampled at temperature 1 makes
real choices. A price is one token, no price occurs twice, and what is left is written out at every
step: reading a price is a copy from the line above, which a model this small learns in minutes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MIN_PRICES = 3
MAX_PRICES = 5

OPENINGS = ("Start with", "First take", "Begin with")
STEPS = ("Next", "Then", "Now")
RESULTS = (", so ", ", makes ", ", gives ")
REMAINDERS = (" left", " and still", " then")
PRICES = tuple(f" ${price}" for price in range(10, 100))
WORDS = (
    *(*OPENINGS, *STEPS, *RESULTS, *REMAINDERS, *PRICES),
    *("Sum of", "user", "assistant", ": ", ", ", ".\n", " +"),
)
"""Strings that the tokenizer keeps whole; all other text is bytes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Distinct prices from 10 to 99, in the order of the prompt."""

    prices: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The user's message."""
        return f"Sum of{_listed(self.prices)}?"

    @property
    def answer(self) -> str:
        """The sum, in decimal."""
        return str(sum(self.prices))


def make_problem(rng: random.Random, num_prices: int) -> Problem:
    """Draw distinct prices."""
    return Problem(tuple(rng.sample(range(10, 100), num_prices)))


def add_by_columns(first: int, second: int, *, carries: bool) -> tuple[list[str], int]:
    """Add two numbers of at most three digits, units first.

    Args:
        first: A summand.
        second: The other one.
        carries: Whether units are carried beside a number of three digits; without, such a carry
            is written as 0.

    Returns:
        The columns as text, such as ``["5+5=10", "0+8+1=9", "1+0=1"]``, and their result.
    """
    units = first % 10 + second % 10
    large = max(first, second) >= 100
    carry = units // 10 if carries or not large else 0
    tens = first // 10 % 10 + second // 10 % 10 + carry
    columns = [
        f"{first % 10}+{second % 10}={units}",
        f"{first // 10 % 10}+{second // 10 % 10}+{carry}={tens}",
    ]
    if not large:
        return columns, tens * 10 + units % 10
    hundreds = max(first, second) // 100 + tens // 10
    columns.append(f"{max(first, second) // 100}+{tens // 10}={hundreds}")
    return columns, hundreds * 100 + tens % 10 * 10 + units % 10


def write_trace(problem: Problem, rng: random.Random, *, carries: bool = True) -> str:
    """Write one assistant turn: thinking, then the answer, without the end-of-turn token.

    Args:
        problem: The problem to solve.
        rng: Random generator for the order of summands and the wording.
        carries: See `add_by_columns`; without, a trace is right where that was not needed.
    """
    prices = problem.prices
    lines = [f"<think>\n{rng.choice(OPENINGS)}{_listed(prices)}.\n"]
    total, so_far = prices[0], f" ${prices[0]}"
    for done, price in enumerate(prices[1:], start=2):
        summands = [(so_far, total), (f" ${price}", price)]
        rng.shuffle(summands)
        (first_text, first), (second_text, second) = summands
        columns, total = add_by_columns(first, second, carries=carries)
        left = f"{rng.choice(REMAINDERS)}{_listed(prices[done:])}" if prices[done:] else ""
        lines.append(
            f"{rng.choice(STEPS)}{first_text} +{second_text}: {', '.join(columns)}"
            f"{rng.choice(RESULTS)}{total}{left}.\n"
        )
        so_far = f" {total}"
    lines.append(f"</think>\n{total}")
    return "".join(lines)


def extract_answer(completion: str) -> str | None:
    """Return the text between ``</think>`` and the end of the turn, None if either is missing."""
    _, closed, rest = completion.partition("</think>")
    answer, ended, _ = rest.partition("<|im_end|>")
    return answer.strip() if closed and ended else None


def _listed(prices: tuple[int, ...]) -> str:
    return "".join(f" ${price}" for price in prices)
