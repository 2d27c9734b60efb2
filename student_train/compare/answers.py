"""Answers of two students to the same prompts: the paired difference, and which answers flipped.

Letter: P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from student_train.compare.runs import ComparedRun, EvaluatedAnswers
from student_train.evaluation.completions import Sample
from student_train.evaluation.figures import Answers
from student_train.evaluation.intervals import Mean

# What two models may differ in and still have answered the same prompts in the same way.
_OF_MODEL = {"model", "end_ids", "batch_size"}


@dataclass(frozen=True)
class Flip:
    """A prompt that one student answers rightly and the other wrongly."""

    prompt: int
    before: Sample
    after: Sample


@dataclass(frozen=True)
class Paired:
    """A run's answers against those of the first run."""

    name: str
    accuracy: Answers
    difference: Mean | None  # of the shares of right answers; None for the first run itself
    lost: Sequence[Flip]  # right before, wrong now
    gained: Sequence[Flip]  # wrong before, right now


def paired_answers(runs: Sequence[ComparedRun]) -> list[Paired]:
    """Compare every run that has all its answers with the first one that has.

    Raises:
        ValueError: If they answered other prompts, or were asked or checked in another way.
    """
    evaluated = [
        (run.name, run.answers)
        for run in runs
        if run.answers is not None and run.answers.is_complete
    ]
    if not evaluated:
        return []
    _, first = evaluated[0]
    return [_paired(name, first, answers) for name, answers in evaluated]


def _paired(name: str, first: EvaluatedAnswers, answers: EvaluatedAnswers) -> Paired:
    _check_same(first, answers)
    num_samples = int(answers.settings["samples_per_prompt"])
    accuracy = Answers.of(answers.samples, num_samples)
    if answers is first:
        return Paired(name, accuracy, None, (), ())
    before_P, after_P = _shares(first), _shares(answers)
    is_right_before, is_right_after = before_P >= 0.5, after_P >= 0.5
    changed = np.flatnonzero(is_right_before != is_right_after).tolist()
    flips = [
        Flip(
            prompt,
            _example(first, prompt, right=bool(is_right_before[prompt])),
            _example(answers, prompt, right=bool(is_right_after[prompt])),
        )
        for prompt in changed
    ]
    return Paired(
        name,
        accuracy,
        Mean.of((after_P - before_P)[None]),
        [flip for flip in flips if flip.before.right],
        [flip for flip in flips if flip.after.right],
    )


def _check_same(first: EvaluatedAnswers, other: EvaluatedAnswers) -> None:
    for name in dict.fromkeys([*first.settings, *other.settings]):
        values = first.settings.get(name), other.settings.get(name)
        if name not in _OF_MODEL and values[0] != values[1]:
            raise ValueError(
                f"{other.file}: evaluated in another way than {first.file} ({name}: "
                f"{values[1]!r}, there {values[0]!r}), so answers cannot be compared prompt by "
                "prompt; evaluate both alike, or name other files with --completions"
            )


def _shares(answers: EvaluatedAnswers) -> NDArray[np.float64]:
    """[P] share of right samples of each prompt."""
    right_P = np.zeros(answers.settings["num_prompts"])
    for sample in answers.samples:
        right_P[sample.prompt] += sample.right
    return right_P / int(answers.settings["samples_per_prompt"])


def _example(answers: EvaluatedAnswers, prompt: int, *, right: bool) -> Sample:
    """The first sample of a prompt with the verdict that most of them have."""
    return next(s for s in answers.samples if s.prompt == prompt and s.right == right)
