"""Completions and their verdicts: the lines of `evaluate --completions`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from student_train.evaluation.sample_log import Lines, SampleLog, read_samples, sample_log


@dataclass(frozen=True)
class Completion:
    """Output of a model for one prompt."""

    text: str  # special tokens included
    num_tokens: int  # the end token included
    finished: bool  # whether it ended by itself


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt, checked: a line of the file."""

    prompt: int  # number of the prompt, from 0
    sample: int  # number among the samples of that prompt, from 0
    group: str | None
    found: str | None  # the answer; None where the chain of thought was never closed
    right: bool
    compared_as: str  # see verdicts.Verdict
    closed: bool  # whether the chain of thought, if one was opened, was closed
    completion: Completion

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Sample":
        """Read a line."""
        return cls(**{**record, "completion": Completion(**record["completion"])})


_LINES = Lines[Sample](
    of_others="the completions of another evaluation",
    place=lambda sample: (sample.prompt, sample.sample),
    to_json=asdict,
    from_json=Sample.from_json,
)


def read_completions(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Settings and samples of an evaluation's file; as `read_samples`."""
    return read_samples(path, _LINES)


def completion_log(
    path: Path | None, settings: Mapping[str, Any], *, force: bool
) -> AbstractContextManager[SampleLog[Sample]]:
    """Open the file of an evaluation; as `sample_log`."""
    return sample_log(path, settings, _LINES, force=force)
