"""One cell of a sweep: a run and its evaluation, as processes of their own.

OUT/cells/NAME/run/            the run, as `train-student run` makes it
OUT/cells/NAME/log.txt         output of the run and its evaluation
OUT/cells/NAME/completions.jsonl, evaluation.json
OUT/cells/NAME/result.json     all figures of the cell; exists once it is finished
OUT/cells/NAME/failed.txt      reason why the last attempt failed
OUT/cells/NAME/lock            held by the processes at work here
"""

import contextlib
import json
import logging
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_train.evaluation.config import EvaluateConfig
from student_train.run.config import TrainConfig
from student_train.sweep.cells import Cell
from student_train.sweep.config import SweepConfig
from student_train.sweep.guard import Guard
from teacher_cache.format.checksums import DamagedFileError, publish_record, read_record, sha256_of
from teacher_cache.format.files import publish
from teacher_cache.format.folder_lock import LOCK_NAME, FolderLock, InUseError
from teacher_cache.format.lead_spans import in_json
from teacher_cache.terminal.config_file import as_words
from teacher_cache.terminal.stop_signals import stop_signals

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "student_train.cli")


def cell_folder(config: SweepConfig, cell: Cell) -> Path:
    """Folder of a cell."""
    return config.out / "cells" / cell.name


def is_finished(config: SweepConfig, cell: Cell) -> bool:
    """Whether a cell has all its figures."""
    return (cell_folder(config, cell) / "result.json").exists()


def run_command(config: SweepConfig, cell: Cell) -> list[str]:
    """Arguments of `train-student` for a cell's run."""
    own = {
        "cache": (config.cache,),
        "student": config.student,
        "out": cell_folder(config, cell) / "run",
        **config.objective_options,
        **(cell.options or {}),
        "seed": cell.seed,
    }
    return ["run", *_config_words(config.run_options), *as_words(TrainConfig, own)]


def evaluate_command(config: SweepConfig, cell: Cell) -> list[str]:
    """Arguments of `train-student` for a cell's evaluation."""
    folder = cell_folder(config, cell)
    own = {
        "model": config.student if cell.options is None else str(folder / "run" / "model"),
        "prompts": config.eval_prompts,
        "cache": config.heldout_cache,
        "completions": folder / "completions.jsonl",
    }
    saved = config.train_options.get("save_dtype")
    if saved is not None and "dtype" not in config.eval_options:
        own["dtype"] = saved  # the untrained student answers in the dtype of the trained ones
    options = _config_words(config.evaluate_options)
    return ["evaluate", "--json", *options, *as_words(EvaluateConfig, own)]


def _config_words(options: Path | None) -> list[str]:
    return [] if options is None else ["--config", str(options)]


class Children:
    """The processes of a sweep or of rounds: SIGINT and SIGTERM end them, and no others start.

    If this process is killed, a guard ends them.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._open = contextlib.ExitStack()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._guard = Guard()

    def run(self, arguments: Sequence[str], *, stdout: int, stderr: int, lock: int) -> int:
        """Run a program, its words first, with open files.

        Returns:
            Its exit code, or -1 if it may no longer start.
        """
        with self._lock:
            if self.stopped_by:
                return -1
            child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[lock],  # held as long as the child lives, whatever becomes of us
                start_new_session=True,  # a Ctrl-C would reach it twice
            )
            self._running.add(child)
            self._guard.watch(each.pid for each in self._running)
        code = child.wait()
        with self._lock:
            self._running.discard(child)
            self._guard.watch(each.pid for each in self._running)
        return code

    def _stop(self, signum: int, *, insists: bool) -> None:
        with self._lock:  # so that a child that is being started is among those that run
            if not insists:
                logger.info("stopping after a checkpoint of each run (once more to stop at once)")
            self.stopped_by = signum
            for child in self._running:
                if insists:
                    child.kill()
                else:
                    child.terminate()  # a run writes a checkpoint and ends

    def __enter__(self) -> "Children":
        switch = self._open.enter_context(stop_signals())
        self._open.enter_context(switch.noted(self._stop))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._guard.close()


def run_cell(config: SweepConfig, cell: Cell, children: Children) -> str:
    """Run the missing parts of a cell.

    Returns:
        A line with the result. A failure is also written to failed.txt.
    """
    try:
        lock = FolderLock(cell_folder(config, cell) / LOCK_NAME)
    except InUseError as error:
        return str(error)
    with lock:
        return _run_commands(config, cell, children, lock)


def _run_commands(config: SweepConfig, cell: Cell, children: Children, lock: FolderLock) -> str:
    folder = cell_folder(config, cell)
    sweep_on = sweep_record(config.out)["cache_fingerprint"]
    commands = [evaluate_command(config, cell)]
    if cell.options is not None:
        commands.insert(0, run_command(config, cell))
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        (folder / "evaluation.json").open("w", encoding="utf-8") as answer,
    ):
        for command in commands:
            out = log if command[0] == "run" else answer
            code = children.run(
                [*PROGRAM, *command], stdout=out.fileno(), stderr=log.fileno(), lock=lock.fileno()
            )
            if children.stopped_by:
                return "stopped"
            if code != 0:
                return _failed(folder, f"exit code {code}: {_last_line(folder / 'log.txt')}")
    try:
        result = _result(config, cell, commands)
    except DamagedFileError as error:
        return _failed(folder, str(error))
    if result.get("cache_fingerprint", sweep_on) != sweep_on:
        return _failed(
            folder,
            "the capture continued, so it was trained on more shards than the sweep began with: "
            "seal the cache, and sweep into another --out",
        )
    publish_record(folder / "result.json", result)
    (folder / "failed.txt").unlink(missing_ok=True)
    return f"accuracy {result['evaluation']['answers']['accuracy']:.1%}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _failed(folder: Path, reason: str) -> str:
    publish(folder / "failed.txt", f"{reason}\n".encode())
    return f"FAILED, {reason}; see {folder / 'log.txt'}"


def _result(config: SweepConfig, cell: Cell, commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    folder = cell_folder(config, cell)
    result: dict[str, Any] = {
        "cell": cell.name,
        "group": cell.group,
        "kind": cell.kind,
        "seed": cell.seed,
        "options": cell.options and {name: in_json(v) for name, v in cell.options.items()},
        "commands": [shlex.join(["train-student", *command]) for command in commands],
        "evaluation": json.loads((folder / "evaluation.json").read_text(encoding="utf-8")),
    }
    result["completions_sha256"] = sha256_of(folder / "completions.jsonl")
    if cell.options is not None:
        run = folder / "run"
        remedy = f"Remove {run} and run the same sweep again."
        begun = read_record(run / "config.json", remedy)
        result["run"] = read_record(run / "result.json", remedy)["metrics"]
        result["student_fingerprint"] = begun["student_fingerprint"]
        result["cache_fingerprint"] = begun["cache_fingerprint"]
    return result


def sweep_record(out: Path) -> dict[str, Any]:
    """Facts that all cells of a sweep's folder share.

    Raises:
        DamagedFileError: If the file is damaged.
    """
    return read_record(
        out / "sweep.json", "Restore it from a copy, or run the sweep in a new --out."
    )
