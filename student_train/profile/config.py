"""Configuration of a profile, checked without loading torch."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from student_train.objective import Objective
from student_train.run.config import TrainConfig
from teacher_cache.format import CachePath
from teacher_cache.terminal.option import check_options, option, same_option

_run = partial(same_option, TrainConfig, changeable=False)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """One call of `train-student profile`."""

    cache: tuple[CachePath, ...] = option(
        "Folder or URI of a cache; repeat it to compare several, such as of different teachers.",
        group="Data",
        basic=True,
        is_repeatable=True,
    )
    where: str | None = _run(
        "where",
        help="""Profile traces whose fields fulfil this, such as 'verdict == "correct"'.""",
    )
    trace_fields: Path | None = _run("trace_fields")
    heldout_share: float = _run(
        "heldout_share",
        help="Proportion of the traces that a run will hold out; they are not profiled.",
    )
    allow_unsealed: bool = _run(
        "allow_unsealed",
        help="Profile the shards committed so far of a capture that is not complete.",
    )
    num_traces: int = option(
        "Largest number of traces to profile, per cache.",
        group="Data",
        default=200,
        basic=True,
        at_least=1,
    )
    seed: int = option("Seed for the choice of traces.", group="Data", default=0, at_least=0)
    student: str = _run("student", help="Model folder or hub id to be trained.")
    student_revision: str | None = _run("student_revision")
    divergence: str = _run("divergence")
    mix: float | None = _run("mix")
    tail: str = _run("tail")
    loss_temperature: float = _run("loss_temperature")
    dtype: str | None = _run("dtype")
    out: Path = option(
        "Folder for profile.json, profile.html and traces.jsonl.", group="Output", basic=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.objective  # refuses what is no divergence or cannot be known from a cache

    @property
    def objective(self) -> Objective:
        """Objective whose divergence is measured."""
        return Objective(self.divergence, self.mix, self.tail, self.loss_temperature)
