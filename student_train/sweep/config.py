"""Configuration of a sweep, and the cells that follow from it. No torch here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from student_train.data.stream import num_steps
from student_train.data.tokens import LOSS_RANGES, TokenSelection
from student_train.evaluation.config import EvaluateConfig
from student_train.run.config import TrainConfig
from student_train.sweep.cells import Cell
from teacher_cache.format import SECTIONS
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.terminal.config_file import as_words, read_config_file
from teacher_cache.terminal.option import check_options, option, options_of, same_option

BASELINES = ("base", "sft", "full", "half-traces", "half-steps", "live")
EVERY_BASELINE_BUT_LIVE = tuple(name for name in BASELINES if name != "live")

_OBJECTIVE = ("divergence", "mix", "tail", "loss_temperature")  # one for all runs of a sweep
# Options that a sweep sets itself; a file of options for every run must not.
_SET_BY_SWEEP = frozenset(
    {"cache", "student", "out", "seed", "live_teacher", "lead_span", "trace_tokens"}
    | {"sections", "loss_on", "lead_span_of", "loss_dropout"}
    | set(_OBJECTIVE)
)
_SET_BY_EVALUATION = frozenset({"model", "prompts", "cache", "completions", "force"})


_data = partial(option, group="Data and student")
_cells = partial(option, group="Cells")
_each = partial(option, group="Every run and evaluation")
_scale_out = partial(option, group="Scale-out")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One call of `train-student sweep`."""

    cache: str = _data("Folder or URI of the cache to train on.", basic=True)
    student: str = _data("Model folder or hub id that every run starts from.", basic=True)
    out: Path = _data(
        "Folder of the sweep; its existing cells are not repeated, new ones are added.", basic=True
    )
    eval_prompts: Path = _data(
        "JSONL of held-out prompts with answers, as evaluate reads them.", basic=True
    )
    heldout_cache: str | None = _data(
        "Cache of held-out traces: measure KL and NLL on all of each.", default=None, basic=True
    )
    allow_seen_prompts: bool = _data(
        "Evaluate even on prompts that are also in the training cache.", default=False
    )
    lead_spans: tuple[float, ...] = _cells(
        "Proportions of every trace, with commas between them.",
        default=(0.1, 0.25, 0.5, 0.75, 1.0),
        basic=True,
        above=0,
        at_most=1,
        can_be_empty=True,
    )
    mixture: tuple[LeadSpans, ...] = _cells(
        "Lead spans with weights, such as 0.375:4,1:1, of which each trace gets one; repeat it for "
        "several mixtures.",
        default=(),
        basic=True,
        is_repeatable=True,
        can_be_empty=True,
        metavar="SPANS",
        parse=LeadSpans.parse,
    )
    trace_tokens_list: tuple[int, ...] = _cells(
        "Token budgets per trace, besides the lead spans.",
        default=(),
        at_least=1,
        can_be_empty=True,
    )
    sections_list: tuple[tuple[str, ...], ...] = _cells(
        "Sets of sections, such as prompt+cot+answer,cot+answer; each with every span.",
        default=(SECTIONS,),
        choices=SECTIONS,
    )
    loss_on_list: tuple[str, ...] = _cells(
        "Parts of a trace that have the span's length and enter the loss; each with every span.",
        default=(TokenSelection.loss_on,),
        choices=LOSS_RANGES,
    )
    lead_span_of: str = same_option(TrainConfig, "lead_span_of", group="Cells")
    loss_dropout: float = same_option(TrainConfig, "loss_dropout", group="Cells")
    baselines: tuple[str, ...] = _cells(
        "Runs to compare the curve with; an empty text for none.",
        default=EVERY_BASELINE_BUT_LIVE,
        basic=True,
        choices=BASELINES,
        can_be_empty=True,
    )
    live_teacher: str | None = _cells(
        "Folder or hub id of the cache's teacher, for the baseline live; for small teachers.",
        default=None,
    )
    num_seeds: int = _cells(
        "Runs per cell, with seeds from 0; more runs give narrower intervals.",
        default=3,
        basic=True,
        at_least=1,
    )
    run_options: Path | None = _each(
        "TOML file of options for every run, as for --config of run.", default=None, basic=True
    )
    evaluate_options: Path | None = _each(
        "TOML file of options for every evaluation, as for --config of evaluate.",
        default=None,
        basic=True,
    )
    divergence: str = same_option(TrainConfig, "divergence", group="Every run and evaluation")
    mix: float | None = same_option(TrainConfig, "mix", group="Every run and evaluation")
    tail: str = same_option(TrainConfig, "tail", group="Every run and evaluation")
    loss_temperature: float = same_option(
        TrainConfig, "loss_temperature", group="Every run and evaluation"
    )
    worker: str = _scale_out(
        "Share of the cells, as i/n with i from 0: one of n such commands, for example "
        "$SLURM_ARRAY_TASK_ID/8.",
        default="0/1",
        unset="all cells",
    )
    num_parallel: int = _scale_out(
        "Cells at a time; they share this machine's devices.", default=1, at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self)
        if "live" in self.baselines and self.live_teacher is None:
            raise ValueError("--baselines live: expected the teacher as --live-teacher, got none")
        list(self.cells(num_steps=2))  # refuses options of every run that do not fit

    def cells(self, num_steps: int) -> Iterator[Cell]:
        """Every cell of this call, seed by seed, so that an early stop leaves whole curves.

        Args:
            num_steps: Number of steps of a full-length run.
        """
        base = [Cell("base", "base", None, None)] if "base" in self.baselines else []
        seen = set()
        for cell in [
            *base,
            *(c for s in range(self.num_seeds) for c in self._of_seed(s, num_steps)),
        ]:
            if cell.name not in seen:
                seen.add(cell.name)
                yield cell

    def _of_seed(self, seed: int, num_steps: int) -> Iterator[Cell]:
        spans: list[dict[str, Any]] = [{"lead_span": span} for span in self.lead_spans]
        spans += [{"trace_tokens": number} for number in self.trace_tokens_list]
        common = {"lead_span_of": self.lead_span_of, "loss_dropout": self.loss_dropout}
        for part, sections, span in product(self.loss_on_list, self.sections_list, spans):
            if part != "lead" and span.get("lead_span") == 1.0:
                continue  # all parts of a whole trace are the same
            chosen = {**span, **common, "loss_on": part, "sections": sections}
            yield Cell.of("span", seed, chosen)
        for mixture in self.mixture:
            yield Cell.of("mixture", seed, {"lead_span": mixture, **common})
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
    def objective_options(self) -> dict[str, Any]:
        """Objective of every run, where it is not a run's default."""
        defaults = options_of(TrainConfig)
        return {
            name: getattr(self, name)
            for name in _OBJECTIVE
            if getattr(self, name) != defaults[name].default
        }

    @property
    def train_options(self) -> dict[str, Any]:
        """Options of every run beside its cell's own."""
        options = self.objective_options
        if self.run_options is not None:
            options |= read_config_file(self.run_options, TrainConfig, reserved=_SET_BY_SWEEP)
        return options

    @property
    def eval_options(self) -> dict[str, Any]:
        """Options of every evaluation."""
        if self.evaluate_options is None:
            return {}
        return read_config_file(self.evaluate_options, EvaluateConfig, reserved=_SET_BY_EVALUATION)

    def command(self) -> list[str]:
        """The command of this call, wherever and however its cells are run."""
        own = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if getattr(self, item.name) != item.default
            and item.name not in ("worker", "num_parallel")
        }
        return ["train-student", "sweep", *as_words(SweepConfig, own)]

    def train_config(self, own: Mapping[str, Any]) -> TrainConfig:
        """The run with a cell's own options, checked; seed and folder are the caller's."""
        options = {**self.train_options, **own}
        return TrainConfig(cache=(self.cache,), student=self.student, out=self.out, **options)

    def num_steps(self, num_traces: int) -> int:
        """Number of steps of a full-length run on this many traces."""
        config = self.train_config({})
        return num_steps(
            num_traces, config.batch_traces, epochs=config.epochs, limit=config.max_steps
        )
