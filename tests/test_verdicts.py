from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.evaluation.answers import final_answer
from student_train.evaluation.checker import Checker
from student_train.evaluation.numerals import last_quantity, readings
from student_train.evaluation.verdicts import plain_verdict

BIG = 10**30


@pytest.fixture(scope="module")
def checker():
    with Checker() as checker:
        yield checker


@pytest.mark.parametrize(
    ("found", "gold", "right", "compared_as"),
    [
        ("190", "190", True, "text"),
        ("190.0", "190", True, "number"),
        ("1,234", "1234", True, "number"),
        ("1,234,567.5", "1234567.50", True, "number"),
        ("1{,}234", "1234", True, "number"),
        (r"1\,234", "1234", True, "number"),
        ("1 234", "1234", True, "number"),
        ("1,00,000", "100000", True, "number"),
        ("+7", "7", True, "number"),
        ("- 5", "-5", True, "number"),
        ("\u22125", "-5", True, "number"),
        ("191", "190", False, "number"),
        ("", "0", False, "no answer"),
        # Exact: floats cannot tell these.
        (str(BIG + 1), str(BIG), False, "number"),
        (f"{BIG:,}", str(BIG), True, "number"),
        ("0.1000000000000000000001", "0.1", False, "number"),
        # A list is no number.
        ("12", "1,2", False, "list"),
        ("1,2", "12", False, "list"),
        ("1,2,345", "12345", False, "list"),
        ("12,34", "1234", False, "list"),
        ("1, 2", "1,2", True, "list"),
        ("(1, 2)", "(1,2)", True, "list"),
        ("1,234", "(1,234)", True, "list"),
        ("1,234; 5,678", "1234, 5678", True, "list"),
        # Fractions.
        (r"\frac12", "0.5", True, "number"),
        (r"\dfrac{1}{2}", "1/2", True, "number"),
        (r"$\frac{2}{4}$", r"\frac{1}{2}", True, "number"),
        ("3 1/2", "7/2", True, "number"),
        (r"3\frac{1}{2}", "3.5", True, "number"),
        (r"-\frac{1}{2}", "-0.5", True, "number"),
        # Units.
        ("18 dollars", "18", True, "number"),
        ("$18", "18", True, "number"),
        (r"\$18", "18 dollars", True, "number"),
        ("18", "18 apples", True, "number"),
        ("18 apples", "18 apple", True, "number"),
        ("18 apples", "18 pears", False, "number"),
        ("60 miles per hour", "60", True, "number"),
        (r"5 \text{ cm}", "5", True, "number"),
        (r"90^\circ", "90", True, "number"),
        ("50%", "50", True, "number"),
        (r"50\%", "0.5", True, "number"),
        ("50%", "0.05", False, "number"),
        # Choices.
        ("(B)", "B", True, "choice"),
        ("B", "(B)", True, "choice"),
        ("b)", "B", True, "choice"),
        ("B. Paris", "B", True, "choice"),
        ("(C) Rome", "B", False, "choice"),
        ("Banana", "B", False, "choice"),
        # Words.
        ("True", "true", True, "words"),
        ("yes", "Yes", True, "words"),
        ("Yes, because it is so", "Yes", True, "words"),
        ("evelyn", "Evelyn", True, "words"),
        ("act", "cat", False, "words"),  # not a product of three variables
        ("True", "False", False, "words"),
        # Sentences.
        ("There are 3 cats and 5 dogs", "5", True, "sentence"),
        ("There are 3 cats and 5 dogs", "3", False, "sentence"),
        ("They meet at 12:45 there", "12", False, "sentence"),
        ("It took about 18 million years", "18", False, "sentence"),
        ("nobody knows that", "5", False, "sentence"),
    ],
)  # fmt: skip
def test_plain_verdicts(found, gold, right, compared_as):
    verdict = plain_verdict(final_answer(found), final_answer(gold))

    assert verdict is not None
    assert (verdict.is_right, verdict.compared_as) == (right, compared_as)


@pytest.mark.parametrize(
    ("found", "gold", "right"),
    [
        ("{2, 1}", "{1, 2}", True),
        ("2,1", "1,2", True),
        ("(2,1)", "(1,2)", False),
        ("[1,2]", "(1,2)", False),
        ("x+1", "1+x", True),
        ("x = 5", "5", True),
        ("0.333333", r"\frac13", True),
        ("0.33", r"\frac13", False),
        ("12:30", "12:45", False),
        ("18 million", "18", False),
        (r"5\pi", "5", False),
        ("1e3", "1000", False),  # not how answers are written
        (r"2^{2^{40}} \bmod 7", "7", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("ab", "ba", True),
        ("nonsense }{", "x+1", False),
    ],
)
def test_mathematics_decides_the_rest(checker, found, gold, right):
    assert plain_verdict(final_answer(found), final_answer(gold)) is None
    verdict = checker.check(final_answer(found), gold)

    assert verdict.is_right is right
    assert verdict.compared_as == "mathematics"


def test_gsm8ks_own_golds_are_right(checker):
    gold = "She sells 9 * 2 = $<<9*2=18>>18 every day at the market.\n#### 18"

    for found in ("18", "**18**", "$18$", "$18", "18 dollars", r"\boxed{18}", "The answer is 18."):
        assert checker.check(final_answer(found), gold).is_right, found
    for found in ("17", "", r"\boxed{}", "18 or 19"):
        assert not checker.check(final_answer(found), gold).is_right, found
    assert not checker.check(None, gold).is_right


def test_the_checker_says_its_name_and_limits(checker):
    assert "math-verify" in checker.name
    assert "3 s of CPU time and 1 GiB" in checker.name


@given(st.integers(-(10**60), 10**60), st.integers(0, 10**9))
def test_every_way_to_write_an_integer_reads_as_its_value(whole, decimals):
    exact = whole + Fraction(decimals, 10**9) * (1 if whole >= 0 else -1)
    sign = "-" if whole < 0 else ""
    assert readings(f"{whole}").quantity.value == whole
    assert readings(f"{whole:,}").quantity.value == whole
    assert readings(f"{whole}.0").quantity.value == whole
    assert readings(f"{sign}{abs(whole):,}.{decimals % 10**9:09d}").quantity.value in (
        exact,
        whole,  # where decimals are 10**9
    )


@given(st.lists(st.integers(-999, 999), min_size=2, max_size=6))
def test_every_list_stays_a_list(numbers):
    written = ",".join(map(str, numbers))
    found = readings(written)

    assert tuple(map(Fraction, numbers)) in found.lists
    joined = written.replace(",", "")
    if found.quantity is None and joined.lstrip("-").isdigit():
        verdict = plain_verdict(joined, written)
        assert verdict is not None
        assert not verdict.is_right


@pytest.mark.slow
@given(st.text(max_size=60))
def test_no_text_breaks_the_reading(text):
    readings(text)
    last_quantity(text)
    plain_verdict(final_answer(text) or "x", "5")
