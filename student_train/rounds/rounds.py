"""`train-student rounds`: rollout, score, train, evaluate, again and again; read it top to bottom.

Each stage is a process, so teacher and student are never in memory together. What the folder holds
decides what is left to do: a stage without a record is run again, and continues by itself.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.evaluation.checker import Checker
from student_train.evaluation.golds import check_golds
from student_train.evaluation.prompts import (
    parse_prompt,
    prompts_fingerprint,
    read_prompts,
    read_records,
)
from student_train.rounds.config import RoundsConfig
from student_train.rounds.figures import figures_of
from student_train.rounds.report import write_report
from student_train.rounds.stages import Stage, run_stage, stages
from student_train.sweep.cell_run import Children
from teacher_cache.format import content_hash, open_cache
from teacher_cache.format.checksums import publish_record, read_record
from teacher_cache.format.folder_lock import LOCK_NAME, FolderLock
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger(__name__)

_RECORD = "rounds.json"
_REMEDY = "Restore it from a copy, or begin in another --out."


@dataclass(frozen=True)
class RoundsResult:
    """Result of a call."""

    report: Path
    table: str  # Markdown
    student: Path  # the last round's


def run_rounds(config: RoundsConfig) -> RoundsResult:
    """Run every stage that is not finished, one after the other, and report on all.

    Raises:
        ValueError: If the settings do not fit the prompts, or the folder holds other rounds.
        CacheError: If the cache to mix in cannot be read.
        DamagedFileError: If a record is damaged.
        InUseError: If another process works in the folder.
        StageFailedError: If a command fails; what is finished stays.
        InterruptedRunError: After SIGINT or SIGTERM.
    """
    facts = _facts(config)
    with FolderLock(config.out / LOCK_NAME, owned=config.out) as lock:
        _check_same(config, facts)
        todo = list(stages(config))
        done = [stage for stage in todo if stage.is_finished]
        shown = Progress("finished", len(todo), "stages", first=len(done))
        with Children() as children, shown:
            for stage in todo:
                if not stage.is_finished:
                    run_stage(stage, children, lock)
                    done.append(stage)
                    _report(config, done)
                    shown.set(len(done))
        table = _report(config, done)
    last = config.out / f"round-{config.num_rounds}" / "run" / "model"
    return RoundsResult(config.out / "report.md", table, last)


def _report(config: RoundsConfig, done: list[Stage]) -> str:
    return write_report(config.out, figures_of(config, done))


def check_rounds_input(config: RoundsConfig) -> str:
    """Read all prompts before anything is run; returns the hash of those to roll out.

    Raises:
        ValueError: If a row is wrong, there are too few, or golds tell nothing.
    """
    records = list(read_records(config.prompts))
    for where, record in records:
        parse_prompt(record, where, needs_answer=False)
    needed = max(1, (config.prompts_per_round or 0) * config.num_rounds)
    if len(records) < needed:
        raise ValueError(
            f"{config.prompts}: expected {needed:,} prompts for {config.num_rounds} rounds, found "
            f"{len(records):,}"
        )
    if config.eval_prompts is not None:
        prompts = list(read_prompts(config.eval_prompts))
        if not prompts:
            raise ValueError(f"{config.eval_prompts}: expected at least one prompt, found none")
        with Checker() as checker:
            check_golds(prompts, checker)
    return content_hash([record for _, record in records])


def _facts(config: RoundsConfig) -> dict[str, Any]:
    """Everything that the rounds of a folder share."""
    prompts = check_rounds_input(config)
    # By content, not by path: another set would put figures of two sets into one table.
    cache = None if config.cache is None else open_cache(config.cache).fingerprint
    asked = None if config.eval_prompts is None else list(read_prompts(config.eval_prompts))
    with Progress("loading torch"):
        from student_train.model.load import model_fingerprint
    return {
        **config.fixed,
        "student": model_fingerprint(config.student),
        "prompts": prompts,
        "eval_prompts_fingerprint": None if asked is None else prompts_fingerprint(asked),
        "cache_fingerprint": cache,
        "teachers": [config.teacher_of(n) for n in range(1, config.num_rounds + 1)],
    }


def _check_same(config: RoundsConfig, facts: dict[str, Any]) -> None:
    """Refuse a folder of other rounds; write its record if it is new."""
    file = config.out / _RECORD
    if file.exists():
        before = read_record(file, _REMEDY)
        for name in sorted({*before, *facts}):
            then, now = before.get(name), facts.get(name)
            if name == "teachers" and isinstance(then, list) and isinstance(now, list):
                shared = min(len(then), len(now))  # more rounds may follow
                facts["teachers"] = max(then, now, key=len)
                then, now = then[:shared], now[:shared]
            if then != now:
                raise ValueError(
                    f"{config.out} holds other rounds ({name}: {then!r} before, {now!r} now). "
                    "Repeat their settings to continue them, or name another --out"
                )
    publish_record(file, facts)
