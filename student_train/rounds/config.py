"""Configuration of rounds, checked without loading torch."""

import json
import tomllib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from student_train.evaluation.config import EvaluateConfig
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.config import TrainConfig
from teacher_cache.format import CachePath, content_hash, shown
from teacher_cache.terminal.config_file import read_config_file
from teacher_cache.terminal.option import check_options, option

# Options that the rounds set themselves; a file of options for a command must not.
_SET_FOR = {
    "rollout": {"model", "prompts", "skip", "limit", "round", "seed", "out", "force"},
    "score": {"model", "traces", "out", "limit", "capture_prompt"},
    "run": {"cache", "cache_weights", "student", "student_revision", "out", "seed", "estimate"}
    | {"other_teacher", "stale_rollouts", "allow_unsealed"},
    "evaluate": {"model", "prompts", "cache", "completions", "force"},
}
# Options that may change between calls, or are compared by what they name.
_COMPARED_OTHERWISE = {
    *("out", "num_rounds", "cache_teacher", "other_teacher"),
    *("teacher", "student", "prompts"),
}
_CONFIGS = {"rollout": RolloutConfig, "run": TrainConfig, "evaluate": EvaluateConfig}

_chain = partial(option, group="Student, teacher and prompts")
_mix = partial(option, group="Mixing")
_each = partial(option, group="Every round")
_output = partial(option, group="Output")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Rounds of rollout, score, training and evaluation."""

    student: str = _chain("Student of the first round: model folder or hub id.", basic=True)
    teacher: tuple[str, ...] = _chain(
        "Teacher that scores the rollouts: model folder or hub id; repeat it to name one for each "
        "round.",
        basic=True,
        is_repeatable=True,
    )
    other_teacher: bool = _chain(
        "Let a student learn from another teacher than before.", default=False
    )
    prompts: Path = _chain("Rows to roll out, as for rollout; they need no answers.", basic=True)
    prompts_per_round: int | None = _chain(
        "Prompts of each round, the next ones in every round.",
        default=None,
        basic=True,
        at_least=1,
        unset="all of them, in every round",
    )
    eval_prompts: Path | None = _chain(
        "Held-out rows with answers: evaluate the student before the first and after every round.",
        default=None,
        basic=True,
    )
    num_rounds: int = _each("Number of rounds; raise it to continue.", default=3, basic=True,
                            at_least=1)  # fmt: skip
    seed: int = _each(
        "Seed for rollouts and training; every round adds its number.", default=0, at_least=0
    )
    cache: CachePath | None = _mix(
        "Cache of the teacher's own traces, mixed into every round.", default=None, basic=True
    )
    own_share: float | None = _mix(
        "Share of the student's own traces in an epoch, with --cache.",
        default=None,
        above=0,
        below=1,
        unset="every trace once per epoch",
    )
    rollout_options: Path | None = _each(
        "TOML file of options for every rollout, as for --config of rollout.", default=None
    )
    score_options: Path | None = _each(
        "TOML file of options for every scoring, as for --config of cache-teacher score.",
        default=None,
    )
    run_options: Path | None = _each(
        "TOML file of options for every training run, as for --config of run.", default=None
    )
    evaluate_options: Path | None = _each(
        "TOML file of options for every evaluation, as for --config of evaluate.", default=None
    )
    cache_teacher: str | None = _each(
        "Command that runs cache-teacher, such as that of another environment.",
        default=None,
        unset="the one installed beside this program",
    )
    out: Path = _output("Folder of all rounds; run again to resume.", basic=True)

    def __post_init__(self) -> None:
        check_options(self)
        if self.own_share is not None and self.cache is None:
            raise ValueError(
                "--own-share: it is the share of own traces beside those of --cache; add --cache"
            )
        if len(self.teacher) not in (1, self.num_rounds):
            raise ValueError(
                f"--teacher: expected one, or one for each of {self.num_rounds} rounds, got "
                f"{len(self.teacher)}"
            )
        if len(set(self.teacher)) > 1 and not self.other_teacher:
            raise ValueError(
                "--teacher: the student would learn from several, each pulling it elsewhere; name "
                "one, or allow it with --other-teacher"
            )
        if self.evaluate_options is not None and self.eval_prompts is None:
            raise ValueError("--evaluate-options: expected --eval-prompts, got none")
        for command in _SET_FOR:
            self.options_of(command)

    def teacher_of(self, number: int) -> str:
        """Teacher of a round; rounds count from 1."""
        return self.teacher[0] if len(self.teacher) == 1 else self.teacher[number - 1]

    def options_file(self, command: str) -> Path | None:
        """File of options for a command of every round."""
        file: Path | None = getattr(self, f"{command}_options")
        return file

    def options_of(self, command: str) -> dict[str, Any]:
        """Content of that file, checked as far as it can be without the capture.

        Raises:
            ValueError: If it cannot be read, or sets what the rounds set.
        """
        file = self.options_file(command)
        if file is None:
            return {}
        if command in _CONFIGS:
            return read_config_file(file, _CONFIGS[command], reserved=_SET_FOR[command])
        return _read_plain(file, _SET_FOR[command])

    @property
    def fixed(self) -> dict[str, Any]:
        """What may not change between the rounds of a folder, as JSON values."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if name not in _COMPARED_OTHERWISE and not name.endswith("_options")
        }
        values["cache"] = None if self.cache is None else shown(self.cache)
        values["eval_prompts"] = self.eval_prompts and str(self.eval_prompts)
        for command in _SET_FOR:
            text = json.dumps(self.options_of(command), sort_keys=True, default=str)
            values[f"{command}_options"] = content_hash(text)
        return values


def _read_plain(file: Path, reserved: Collection[str]) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file}: expected a TOML file: {error}") from error
    for name in content:
        if name.replace("-", "_") in reserved:
            raise ValueError(f"{file}: {name}: not allowed here, it is set elsewhere")
    return content
