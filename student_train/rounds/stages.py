"""The stages of rounds: commands that a person can run alone, each finished once and recorded.

OUT/start/evaluation.json            the student before the first round, as `evaluate --json` says
OUT/round-N/rollouts.jsonl           its traces
OUT/round-N/cache                    the same, scored by the teacher
OUT/round-N/run                      training on them
OUT/round-N/completions.jsonl        answers of the student after it
OUT/round-N/log.txt                  what the commands said
OUT/round-N/STAGE.json               command, seconds and result; exists once a stage is finished
"""

import json
import logging
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.errors import InterruptedRunError, StageFailedError
from student_train.evaluation.config import EvaluateConfig
from student_train.rounds.config import RoundsConfig
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.config import TrainConfig
from student_train.sweep.cell_run import PROGRAM, Children
from teacher_cache.format.checksums import publish_record, read_record
from teacher_cache.format.folder_lock import FolderLock
from teacher_cache.terminal.config_file import as_words

logger = logging.getLogger(__name__)

_REMEDY = "Remove it: the stage is run again, which takes no time where its output is whole."


@dataclass(frozen=True)
class Stage:
    """One command, with the file that says that it is finished."""

    name: str  # rollout, score, run or evaluate
    number: int  # of the round; 0 for the student before the first
    folder: Path
    command: tuple[str, ...]  # as a person types it
    program: tuple[str, ...]  # what runs its first word

    @property
    def file(self) -> Path:
        """Its record."""
        return self.folder / f"{self.name}.json"

    @property
    def is_finished(self) -> bool:
        """Whether it need not run again."""
        return self.file.exists()

    def record(self) -> dict[str, Any]:
        """Command, seconds and result of a finished stage.

        Raises:
            DamagedFileError: If the record is damaged.
        """
        return read_record(self.file, _REMEDY)


def student_before(config: RoundsConfig, number: int) -> str:
    """The student that a round starts from; rounds count from 1."""
    if number == 1:
        return config.student
    return str(round_folder(config, number - 1) / "run" / "model")


def round_folder(config: RoundsConfig, number: int) -> Path:
    """Folder of a round; of the student before the first for 0."""
    return config.out / (f"round-{number}" if number else "start")


def stages(config: RoundsConfig) -> Iterator[Stage]:
    """All stages in order.

    Raises:
        ValueError: If there is no `cache-teacher`.
    """
    capture = _capture_program(config)
    if config.eval_prompts is not None:
        yield _evaluation(config, 0, config.student)
    for number in range(1, config.num_rounds + 1):
        folder, student = round_folder(config, number), student_before(config, number)
        traces, cache, run = folder / "rollouts.jsonl", folder / "cache", folder / "run"
        per_round = config.prompts_per_round
        rollout = {
            "model": student, "prompts": config.prompts, "out": traces, "round": number,
            "skip": 0 if per_round is None else (number - 1) * per_round, "limit": per_round,
            "seed": config.seed + number,
        }  # fmt: skip
        words = as_words(RolloutConfig, rollout)
        yield _own(config, "rollout", number, ["rollout", "--json", *words])
        score = [
            "score", *_file_words(config, "score"), "--model", config.teacher_of(number),
            "--traces", str(traces), "--out", str(cache), "--no-capture-prompt",
        ]  # fmt: skip
        yield Stage("score", number, folder, ("cache-teacher", *score), capture)
        train = {
            "cache": (str(cache),) if config.cache is None else (config.cache, str(cache)),
            "cache_weights": config.own_share and (1 - config.own_share, config.own_share),
            "student": student, "out": run, "seed": config.seed + number,
        }  # fmt: skip
        words = as_words(TrainConfig, train)
        allow = ["--other-teacher"] if config.other_teacher else []
        yield _own(config, "run", number, ["run", *words, *allow])
        if config.eval_prompts is not None:
            yield _evaluation(config, number, str(run / "model"))


def _evaluation(config: RoundsConfig, number: int, model: str) -> Stage:
    completions = round_folder(config, number) / "completions.jsonl"
    own = {"model": model, "prompts": config.eval_prompts, "completions": completions}
    return _own(config, "evaluate", number, ["evaluate", "--json", *as_words(EvaluateConfig, own)])


def _own(config: RoundsConfig, name: str, number: int, words: Sequence[str]) -> Stage:
    first, *rest = words
    command = ("train-student", first, *_file_words(config, name), *rest)
    return Stage(name, number, round_folder(config, number), command, PROGRAM)


def _file_words(config: RoundsConfig, name: str) -> list[str]:
    file = config.options_file(name)
    return [] if file is None else ["--config", str(file)]


def _capture_program(config: RoundsConfig) -> tuple[str, ...]:
    """What runs `cache-teacher`: a program of its own, which this one never imports."""
    if config.cache_teacher is not None:
        return tuple(shlex.split(config.cache_teacher))
    beside = str(Path(sys.executable).parent)
    found = shutil.which("cache-teacher", path=beside) or shutil.which("cache-teacher")
    if found is None:
        raise ValueError(
            f"--cache-teacher: no program of this name in {beside} or on the PATH; name the "
            "command that runs it"
        )
    return (found,)


def run_stage(stage: Stage, children: Children, lock: FolderLock) -> None:
    """Run a stage as a process of its own, and record its result.

    Raises:
        StageFailedError: If its command fails.
        InterruptedRunError: If the rounds are asked to stop meanwhile.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    shown, log = shlex.join(stage.command), stage.folder / "log.txt"
    logger.info("round %d, %s: %s", stage.number, stage.name, shown)
    began_s = time.monotonic()
    code, output = run_command(stage, log, children, lock)
    if children.stopped_by:
        raise InterruptedRunError(
            f"stopped in round {stage.number}, {stage.name}; run the same command again to resume",
            children.stopped_by,
        )
    if code != 0:
        raise StageFailedError(
            f"round {stage.number}, {stage.name}: {_ending(code, log)}; see {log}. Put that "
            "right and run the same command again: what is finished stays"
        )
    result = _figures_of(output, stage, log) if "--json" in stage.command else output.strip()
    seconds = time.monotonic() - began_s
    publish_record(stage.file, {"command": shown, "seconds": seconds, "result": result})


def _ending(code: int, log: Path) -> str:
    """How a command failed; its last line says nothing of a signal."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (as when memory runs out)"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    return f"{last} (exit code {code})"


def _figures_of(output: str, stage: Stage, log: Path) -> dict[str, Any]:
    """The JSON object that a command prints last; a library may have printed before it."""
    lines = output.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise StageFailedError(
            f"round {stage.number}, {stage.name}: expected its figures as JSON, found "
            f"{output.strip()[-200:]!r}; see {log}, and run the same command again"
        ) from error
    return found


def run_command(stage: Stage, log: Path, children: Children, lock: FolderLock) -> tuple[int, str]:
    """Run a stage's command, with its messages appended to a log.

    Returns:
        Its exit code, and what it printed.
    """
    answer = stage.folder / f".{stage.name}-answer"
    with log.open("a", encoding="utf-8") as said, answer.open("w+", encoding="utf-8") as told:
        said.write(f"$ {shlex.join(stage.command)}\n")
        said.flush()
        arguments = [*stage.program, *stage.command[1:]]
        code = children.run(
            arguments, stdout=told.fileno(), stderr=said.fileno(), lock=lock.fileno()
        )
        told.seek(0)
        output = told.read()
    answer.unlink()
    return code, output
