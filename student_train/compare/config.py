"""Configuration of a comparison."""

from dataclasses import dataclass
from pathlib import Path

from teacher_cache.terminal.option import check_options, option


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One call of `train-student compare`."""

    run: tuple[Path, ...] = option(
        "Folders of runs, or of a sweep's cells; the others are compared with the first.",
        is_argument=True,
        is_repeatable=True,
    )
    completions: tuple[Path, ...] = option(
        "File that `train-student evaluate --completions` wrote, once for every RUN in their "
        "order.",
        default=(),
        is_repeatable=True,
        can_be_empty=True,
        unset="completions.jsonl in the run's or the cell's folder, if there is one",
    )
    prompts: Path | None = option(
        "Prompts of these evaluations: shows question and reference answer beside the completions.",
        default=None,
    )
    flips: int = option(
        "Largest number of answers to show of each run and kind of change.",
        default=20,
        at_least=0,
    )
    out: Path = option("Page to write, one HTML file.", letter="o")
    force: bool = option("Overwrite the file if it exists.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.run) < 2:
            raise ValueError("RUN: expected at least two folders to compare, got one")
        if self.completions and len(self.completions) != len(self.run):
            raise ValueError(
                f"--completions: expected one file for each of {len(self.run)} runs, got "
                f"{len(self.completions)}"
            )
