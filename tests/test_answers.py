import pytest

from student_train.evaluation.answers import boxed, extract_answer, is_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3+4=7</think>7<end>", "7"),
        ("<think>a</think>b</think> 42 \n<end>", "42"),
        ("no marks at all<end>", "no marks at all"),
        ("<think>never closed", "<think>never closed"),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_last_closing_mark(text, answer):
    assert extract_answer(text, "</think>", ["<end>"]) == answer


def test_another_closing_mark_or_none_can_be_named():
    assert extract_answer("x|SOLUTION|y", "|SOLUTION|", []) == "y"
    assert extract_answer("x</think>y", "", []) == "x</think>y"


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        ("190", "190", True),
        (" 190\n", "190", True),
        ("190.0", "190", True),
        ("1,234", "1234", True),
        ("-5", "- 5", False),
        ("+7", "7", True),
        ("191", "190", False),
        ("", "0", False),
        ("yes", "yes", True),
        ("Yes", "yes", False),
        ("nan", "inf", False),
        ("1e3", "1000", False),  # not how answers are written
    ],
)
def test_answers_compare_as_text_or_as_numbers(found, wanted, right):
    assert is_right(found, wanted) is right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{never closed", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7}" + r"\boxed{" * 5000, "7"),  # what a student in a loop writes
        ("none", None),
    ],
)
def test_the_last_box_that_closes_counts(text, content):
    assert boxed(text) == content


def test_a_boxed_answer_is_taken_out_of_its_sentence():
    text = r"<think>\boxed{1}</think>The answer is \boxed{1,234}.<end>"

    assert extract_answer(text, "</think>", ["<end>"]) == "1,234"
    assert is_right("1234", r"\boxed{1,234}")


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"$\frac{2}{4}$", r"\frac{1}{2}", True),
        ("{1, 2}", "{2, 1}", True),
        (r"\frac{1}{3}", "0.5", False),
        ("", "0", False),
        ("x+1", "1+x", True),
    ],
)
def test_answers_compare_as_mathematics_where_asked(found, wanted, right):
    pytest.importorskip("math_verify")

    assert is_right(found, wanted, with_math=True) is right
    assert not is_right(found, wanted)
