"""Answers: found in what a model wrote, and compared with the right ones."""

import importlib.util
import logging
import re
from collections.abc import Sequence

_BOXED = "\\boxed{"


def extract_answer(text: str, think_close: str, special_tokens: Sequence[str]) -> str:
    r"""What follows the last closing mark, or all where there is none, without special tokens.

    Of an answer that has a ``\boxed{...}``, the content of the last one.
    """
    answer = text.rpartition(think_close)[2] if think_close else text
    for token in special_tokens:
        answer = answer.replace(token, "")
    return boxed(answer) or answer.strip()


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces close, None where there is none."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth, first = 1, start + len(_BOXED)
        for place in range(first, end):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[first:place].strip()
        end = start  # it never closes: the one before, in what stands before it
    return None


def is_right(found: str, wanted: str, *, with_math: bool = False) -> bool:
    """Whether two answers are the same text, or numbers of the same value.

    Args:
        found: By the model.
        wanted: The right one; may be boxed.
        with_math: Compare as mathematics too, with math-verify, which must be installed.
    """
    wanted = boxed(wanted) or wanted.strip()
    if found.strip() == wanted:
        return True
    numbers = [_number(found), _number(wanted)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return with_math and bool(found.strip()) and _is_same_mathematics(found, wanted)


def has_math_verify() -> bool:
    """Whether answers can be compared as mathematics."""
    return importlib.util.find_spec("math_verify") is not None


def _number(text: str) -> float | None:
    plain = text.strip().replace(",", "")
    return float(plain) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", plain) else None


def _is_same_mathematics(found: str, wanted: str) -> bool:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it reports every odd answer
    # Without time limits of its own, which need the main thread's signals.
    right, given = (
        math_verify.parse(f"${text.strip().strip('$')}$", parsing_timeout=None)
        for text in (wanted, found)
    )
    return bool(math_verify.verify(right, given, timeout_seconds=None))
