"""Reading of runs for a comparison: settings, metrics so far, and evaluated answers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.evaluation.completions import Sample, read_completions
from teacher_cache.format.checksums import read_record
from teacher_cache.terminal.escape import printable

COMPLETIONS_NAME = "completions.jsonl"


@dataclass(frozen=True)
class EvaluatedAnswers:
    """Completions of one evaluation."""

    file: Path
    settings: Mapping[str, Any]
    samples: Sequence[Sample]  # by prompt

    @property
    def num_expected(self) -> int:
        """Number of samples of the whole evaluation."""
        return int(self.settings["num_prompts"]) * int(self.settings["samples_per_prompt"])

    @property
    def is_complete(self) -> bool:
        """Whether the evaluation is finished."""
        return len(self.samples) == self.num_expected


@dataclass(frozen=True)
class ComparedRun:
    """One column of a comparison."""

    name: str  # printable
    settings: Mapping[str, Any]  # empty for a student that was not trained
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    is_finished: bool
    answers: EvaluatedAnswers | None

    def latest(self, name: str) -> float | None:
        """The last value of a metric; None if it was never measured."""
        return next((float(line[name]) for line in reversed(self.metrics) if name in line), None)


def read_run(folder: Path, completions: Path | None = None, name: str | None = None) -> ComparedRun:
    """Read a run's folder, or a cell's of a sweep.

    Args:
        folder: The folder.
        completions: File of its evaluated answers, if not where they usually are.
        name: What to call it; the folder's if None.

    Raises:
        ValueError: If it is neither, or a line of the metrics is not JSON.
        DamagedFileError: If its settings or completions are damaged.
        OSError: If a file cannot be read.
    """
    run = folder / "run" if (folder / "run" / "config.json").is_file() else folder
    usual = folder / COMPLETIONS_NAME
    file = completions or (usual if usual.is_file() else None)
    has_run = (run / "metrics.jsonl").is_file() and (run / "config.json").is_file()
    if not has_run and file is None:
        raise ValueError(
            f"{printable(folder)}: expected the folder of a run (config.json and metrics.jsonl) or "
            f"of a sweep's cell ({COMPLETIONS_NAME}), found "
            f"{'neither' if folder.is_dir() else 'no such folder'}"
        )
    answers = None if file is None else EvaluatedAnswers(file, *read_completions(file))
    name = printable(name or folder)
    if not has_run:
        return ComparedRun(name, {}, (), is_finished=True, answers=answers)
    remedy = "Restore it from a copy, or leave this run out."
    record = read_record(run / "config.json", remedy)
    identity = ("cache_fingerprint", "student_fingerprint", "heldout_fingerprint")
    settings = {**record["config"], **{key: record[key] for key in identity}}
    is_finished = (run / "result.json").is_file()
    return ComparedRun(name, settings, _metrics(run / "metrics.jsonl"), is_finished, answers)


def _metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole line; a run at work may be in the middle of the next."""
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not all(map(_is_number, values.values())):
                raise ValueError("no object of numbers")
            found.append({name: math.nan if v is None else v for name, v in values.items()})
        except ValueError as error:
            raise ValueError(
                f"{file}:{number}: expected a line of metrics, found damage ({error}); leave this "
                "run out, or restore the file from a copy"
            ) from error
    return found


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Settings that trained runs do not share, and each run's value in words."""
    trained = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in trained for name in run.settings)
    return {
        name: [_in_words(run, name) for run in runs]
        for name in names
        if name != "out" and len({_in_words(run, name) for run in trained}) > 1
    }


def _in_words(run: ComparedRun, name: str) -> str:
    if not run.settings:
        return "not trained"
    value = run.settings.get(name)
    return (
        "not set"
        if value is None
        else printable(value if isinstance(value, str) else json.dumps(value))
    )
