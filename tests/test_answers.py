import pytest

from student_train.evaluation.answers import (
    ThinkingMarks,
    bare,
    boxed,
    extract_answer,
    final_answer,
)

MARKS = ThinkingMarks("<think>", "</think>")


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("3+4", "<think>3+4=7</think>7<end>", "7"),
        ("3+4", "<think>a</think>b</think> 42 \n<end>", "42"),
        ("3+4", "no marks at all<end>", "no marks at all"),
        ("3+4", "", ""),
        ("3+4<think>", "it is 7</think>7", "7"),  # the chat template opens it
        # Never closed: no answer, whatever stands in it.
        ("3+4", r"<think>never closed \boxed{7}", None),
        ("3+4<think>\n", r"never closed \boxed{7}", None),
        ("3+4", "<think>a</think>7<think>or rather", None),
        ("<think>earlier turn</think> and now", "7", "7"),
    ],
)
def test_the_answer_is_what_follows_the_chain_of_thought(prompt, text, answer):
    assert extract_answer(prompt, text, MARKS, ["<end>"]) == answer


def test_another_closing_mark_or_none_can_be_named():
    assert extract_answer("", "x|SOLUTION|y", ThinkingMarks("|THOUGHT|", "|SOLUTION|"), []) == "y"
    assert extract_answer("", "x</think>y", ThinkingMarks("", ""), []) == "x</think>y"
    assert extract_answer("", "<think>x", ThinkingMarks("<think>", ""), []) == "<think>x"


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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is \boxed{1,234}.", "1,234"),
        (r"It is 5, so \boxed{}", ""),  # given as empty: nothing else is taken for it
        ("She sells 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 18\nfurther text", "18"),
        ("#### 1,000 ", "1,000"),
        ("So the final answer is: **73**.", "73"),
        ("**Answer:** 73", "73"),
        ("Answer:\n\n(B)", "(B)"),
        ("The answer is 18 dollars. She is glad.", "18 dollars"),
        ("The answer is 3.5", "3.5"),
        ("**73**", "73"),
        ("$73$", "73"),
        ("$$73$$", "73"),
        (r"\(x+1\)", "x+1"),
        (r"\[ x+1 \]", "x+1"),
        (r"\text{Evelyn}", "Evelyn"),
        ("$18", "$18"),  # money
        ("18.", "18"),
        ("`73`", "73"),
    ],
)
def test_the_final_answer_is_bare(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["$1$ + $2$", "**a** and **b**", r"\text{a}_{2}", "$", "**", ""])
def test_marks_that_are_not_around_the_whole_stay(text):
    assert bare(text) == text
