"""What can be set for a sweep, and the cells that follow from it. No torch here."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from student_train.data.tokens import ALL_SECTIONS, LOSS_RANGES, TokenSelection
from student_train.evaluation.config import EvaluateConfig
from student_train.run.config import TrainConfig
from student_train.sweep.cells import Cell, in_one_text

BASELINES = ("base", "sft", "full", "half-traces", "half-steps", "live")
EVERY_BASELINE_BUT_LIVE = tuple(name for name in BASELINES if name != "live")

# What a sweep sets itself; a file of options for every run must not.
_SET_BY_SWEEP = frozenset(
    {"cache", "student", "out", "seed", "live_teacher", "lead_span", "max_tokens"}
    | {"sections", "loss_on", "lead_span_of", "loss_dropout"}
)
_SET_BY_EVALUATION = frozenset({"model", "prompts", "cache", "completions"})


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One call of `train-student sweep`. Command-line options mirror these fields."""

    cache: str
    student: str
    out: Path
    eval_prompts: Path
    eval_cache: str | None = None
    lead_spans: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    max_tokens_list: tuple[int, ...] = ()
    sections_list: tuple[tuple[str, ...], ...] = (ALL_SECTIONS,)
    loss_on: tuple[str, ...] = ("lead",)
    lead_span_of: str = TokenSelection.lead_span_of
    loss_dropout: float = 0.0
    baselines: tuple[str, ...] = EVERY_BASELINE_BUT_LIVE
    live_teacher: str | None = None
    seeds: int = 3
    run_options: Path | None = None
    evaluate_options: Path | None = None
    worker: str = "0/1"
    parallel: int = 1
    allow_seen_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, choices in (("baselines", BASELINES), ("loss_on", LOSS_RANGES)):
            unknown = [value for value in getattr(self, name) if value not in choices]
            if unknown:
                raise ValueError(
                    f"{name}: expected some of {', '.join(choices)}, got {unknown[0]!r}"
                )
        if not self.loss_on or not self.sections_list:
            raise ValueError("loss_on and sections-list: expected at least one each, got none")
        if "live" in self.baselines and self.live_teacher is None:
            raise ValueError("baseline live: expected the teacher as --live-teacher, got none")
        list(self.cells(num_steps=2))  # refuses spans and sections that cannot be

    def cells(self, num_steps: int) -> Iterator[Cell]:
        """Every cell of this call, seed by seed, so that an early stop leaves whole curves.

        Args:
            num_steps: Of a full-length run.
        """
        base = [Cell("base", "base", None, None)] if "base" in self.baselines else []
        seen = set()
        for cell in [*base, *(c for s in range(self.seeds) for c in self._of_seed(s, num_steps))]:
            if cell.name not in seen:
                seen.add(cell.name)
                yield cell

    def _of_seed(self, seed: int, num_steps: int) -> Iterator[Cell]:
        spans: list[dict[str, Any]] = [{"lead_span": span} for span in self.lead_spans]
        spans += [{"max_tokens": number} for number in self.max_tokens_list]
        common = {"lead_span_of": self.lead_span_of, "loss_dropout": self.loss_dropout}
        for part, sections, span in product(self.loss_on, self.sections_list, spans):
            if part != "lead" and span.get("lead_span") == 1.0:
                continue  # all parts of a whole trace are the same
            chosen = {**span, **common, "loss_on": part, "sections": sections}
            yield Cell.of("span", seed, chosen)
        half = max(1, num_steps // 2)
        if "full" in self.baselines:
            yield Cell.of("span", seed, {"lead_span": 1.0})
        if "sft" in self.baselines:
            yield Cell.of("sft", seed, {"ce_weight": 1.0})
        if "half-traces" in self.baselines:
            share = self.train_options.get("heldout_share", 0.0)
            held_out = 1 - (1 - share) / 2
            yield Cell.of("half-traces", seed, {"heldout_share": held_out, "max_steps": half})
        if "half-steps" in self.baselines:
            yield Cell.of("half-steps", seed, {"max_steps": half})
        if "live" in self.baselines:
            yield Cell.of("live", seed, {"live_teacher": self.live_teacher})

    @property
    def train_options(self) -> dict[str, Any]:
        """What every run is told beside its cell's own options."""
        return _read_options(self.run_options, TrainConfig, _SET_BY_SWEEP)

    @property
    def eval_options(self) -> dict[str, Any]:
        """What every evaluation is told."""
        return _read_options(self.evaluate_options, EvaluateConfig, _SET_BY_EVALUATION)

    def command(self) -> list[str]:
        """The command that makes this call, wherever and however its cells are run."""
        words = ["train-student", "sweep"]
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default or item.name in ("worker", "parallel"):
                continue
            words.append(f"--{item.name.replace('_', '-')}")
            if value is not True:
                words.append(in_one_text(value))
        return words

    def train_config(self, own: Mapping[str, Any]) -> TrainConfig:
        """The run with a cell's own options, checked; seed and folder are the caller's."""
        options = {**self.train_options, **own}
        for name, value in options.items():
            if isinstance(value, list):
                options[name] = tuple(value)
        return TrainConfig(cache=(self.cache,), student=self.student, out=self.out, **options)

    def num_steps(self, num_traces: int) -> int:
        """Of a full-length run on so many traces."""
        config = self.train_config({})
        in_epochs = config.epochs * -(-num_traces // config.batch_traces)
        return int(min(in_epochs, config.max_steps or math.inf))


def _read_options(
    path: Path | None, config: type[TrainConfig] | type[EvaluateConfig], reserved: frozenset[str]
) -> dict[str, Any]:
    """A TOML file of a command's options."""
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {item.name for item in fields(config)} - reserved
    for name in values:
        if name not in known:
            why = "the sweep sets it itself" if name in reserved else "there is no such option"
            raise ValueError(f"{path}: {name}: {why}")
    return values
