"""`train-student sweep`: runs the cells, each a normal run and its evaluation in its own folder.

OUT/sweep.json                 what all cells have in common
OUT/cells/NAME/run/            a run, as `train-student run` makes it
OUT/cells/NAME/log.txt         what it and its evaluation said
OUT/cells/NAME/completions.jsonl, evaluation.json
OUT/cells/NAME/result.json     all figures of the cell; there when it is finished
OUT/cells/NAME/failed.txt      why the last try failed
OUT/results.csv, report.png, report.html
"""

import hashlib
import json
import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.cells import FULL, Cell, SweepConfig
from student_train.costs import span_costs
from student_train.data import open_data
from student_train.errors import InterruptedRunError
from student_train.prompts import Prompt, prompt_ids, read_prompts, seen_in
from student_train.student import load_tokenizer
from teacher_cache.format import Cache, open_cache, parse_worker

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "student_train.cli")


@dataclass(frozen=True)
class SweepResult:
    """What a call came to."""

    num_finished: int  # cells of this call, those of earlier calls included
    failed: tuple[str, ...]  # names
    is_complete: bool  # no cell of this call is left to other workers


def sweep(config: SweepConfig) -> SweepResult:
    """Run every cell that is not finished yet; a cell that fails does not stop the others.

    Raises:
        CacheError: If a cache cannot be read.
        ValueError: If the settings do not fit each other, the cache or the folder, or evaluation
            prompts were trained on.
        InterruptedRunError: After SIGINT or SIGTERM; the runs in progress have stopped.
    """
    data = open_data(
        [config.cache],
        where=config.train_options.get("where"),
        heldout_share=config.train_options.get("heldout_share", 0.0),
    )
    cache = data.sources[0].cache
    cells = list(config.cells(config.num_steps(data.num_traces)))
    _check_cells(config, cells, cache)
    prompts = list(read_prompts(config.eval_prompts, config.eval_options.get("group_by")))
    if not prompts:
        raise ValueError(f"{config.eval_prompts}: expected at least one prompt, found none")
    if not config.allow_seen_prompts:
        _refuse_seen_prompts(config, prompts, cache)
    _describe(config, cache)
    mine = _part(cells, config.worker)
    unfinished = [cell for cell in mine if not _is_finished(config, cell)]
    where = "" if len(mine) == len(cells) else f" (worker {config.worker})"
    logger.info("%d cells, %d of them to run here%s", len(cells), len(unfinished), where)
    if not any(cell.group == FULL for cell in cells) and not _has_group(config, FULL):
        logger.warning(
            "no full-length cell: retention has no base and is left out; add 1.0 to --lead-spans "
            "or full to --baselines"
        )
    _run_all(config, unfinished, cache)
    left = [cell for cell in cells if not _is_finished(config, cell)]
    failed = tuple(c.name for c in left if _folder(config, c).joinpath("failed.txt").exists())
    return SweepResult(len(cells) - len(left), failed, is_complete=len(left) == len(failed))


# --- before a cell runs ------------------------------------------------------------------------


def _check_cells(config: SweepConfig, cells: Sequence[Cell], cache: Cache) -> None:
    for cell in cells:
        if cell.options is not None:
            config.train_config(cell)
            sections = cell.options.get("sections", ())
            if "prompt" in sections and not cache.header.capture_prompt:
                raise ValueError(
                    f"sections {'+'.join(sections)}: {cache.path} has no distributions of prompts; "
                    "capture with --capture-prompt, or leave prompt out"
                )


def _refuse_seen_prompts(config: SweepConfig, prompts: Sequence[Prompt], cache: Cache) -> None:
    tokenizer = load_tokenizer(config.student)
    seen = seen_in(cache, [prompt_ids(tokenizer, prompt) for prompt in prompts])
    if seen:
        prompt = prompts[seen[0]]
        raise ValueError(
            f"{config.eval_prompts}: {len(seen):,} of {len(prompts):,} prompts stand in the "
            f"training cache {cache.path} (the first is prompt {seen[0] + 1}: "
            f"{prompt.text or prompt.messages}). Use others, or --allow-seen-prompts."
        )


def _describe(config: SweepConfig, cache: Cache) -> None:
    """Write what all cells have in common, or check that it is what the folder's cells had."""
    facts = {
        "cache": cache.path,
        "cache_fingerprint": cache.fingerprint,
        "student": config.student,
        "train_options": config.train_options,
        "eval_prompts": str(config.eval_prompts),
        "eval_prompts_sha256": hashlib.sha256(config.eval_prompts.read_bytes()).hexdigest(),
        "eval_cache": config.eval_cache,
        "eval_cache_fingerprint": config.eval_cache and open_cache(config.eval_cache).fingerprint,
        "eval_options": {
            k: str(v) if isinstance(v, Path) else v for k, v in config.eval_options.items()
        },
    }
    file = config.out / "sweep.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        moved = {"cache", "student", "eval_prompts", "eval_cache"}  # they may lie elsewhere now
        for name in facts.keys() - moved:
            if before.get(name) != facts[name]:
                raise ValueError(
                    f"{config.out} holds another sweep ({name}: {before.get(name)!r} before, "
                    f"{facts[name]!r} now). Name another --out, or repeat that sweep's settings."
                )
        return
    if config.out.exists() and any(config.out.iterdir()):
        raise ValueError(f"{config.out}: expected an empty folder or a sweep's, found other files")
    config.out.mkdir(parents=True, exist_ok=True)
    _write_json(file, facts)


def _part(cells: Sequence[Cell], worker: str) -> Sequence[Cell]:
    _, part = parse_worker(worker)
    if part is None:
        raise ValueError(f"worker: expected i/n, got {worker!r}")
    return cells[part.index :: part.count]


def _has_group(config: SweepConfig, group: str) -> bool:
    return any((config.out / "cells").glob(f"{group}_seed-*/result.json"))


def _is_finished(config: SweepConfig, cell: Cell) -> bool:
    return (_folder(config, cell) / "result.json").exists()


# --- a cell --------------------------------------------------------------------------------------


def run_command(config: SweepConfig, cell: Cell) -> list[str]:
    """Arguments of `train-student` for a cell's run."""
    arguments = ["run", "--cache", config.cache, "--student", config.student]
    arguments += ["--out", str(_folder(config, cell) / "run")]
    if config.run_options is not None:
        arguments += ["--config", str(config.run_options)]
    for name, value in (cell.options or {}).items():
        text = ",".join(value) if isinstance(value, tuple) else f"{value}"
        arguments += [f"--{name.replace('_', '-')}", text]
    return [*arguments, "--seed", str(cell.seed)]


def evaluate_command(config: SweepConfig, cell: Cell) -> list[str]:
    """Arguments of `train-student` for a cell's evaluation."""
    folder = _folder(config, cell)
    model = config.student if cell.options is None else str(folder / "run" / "model")
    arguments = ["evaluate", "--model", model, "--prompts", str(config.eval_prompts), "--json"]
    if config.eval_cache is not None:
        arguments += ["--cache", config.eval_cache]
    if config.evaluate_options is not None:
        arguments += ["--config", str(config.evaluate_options)]
    return [*arguments, "--completions", str(folder / "completions.jsonl")]


def _run_all(config: SweepConfig, cells: Sequence[Cell], cache: Cache) -> None:
    started_s = time.monotonic()
    with _Children() as children, ThreadPoolExecutor(config.parallel) as pool:
        running = {pool.submit(_run_cell, config, cell, cache, children): cell for cell in cells}
        for number, done in enumerate(as_completed(running), start=1):
            if children.stopped_by:
                continue
            per_cell_s = (time.monotonic() - started_s) / number
            logger.info(
                "%d/%d %s: %s | eta %.0f min",
                number, len(cells), running[done].name, done.result(),
                per_cell_s * (len(cells) - number) / 60,
            )  # fmt: skip
    if children.stopped_by:
        raise InterruptedRunError(
            "stopped; run the same command again to go on where it stood", children.stopped_by
        )


def _run_cell(config: SweepConfig, cell: Cell, cache: Cache, children: "_Children") -> str:
    """Run what is missing of a cell; a line that says what came of it."""
    folder = _folder(config, cell)
    folder.mkdir(parents=True, exist_ok=True)
    commands = [evaluate_command(config, cell)]
    if cell.options is not None:
        commands.insert(0, run_command(config, cell))
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        (folder / "evaluation.json").open("w", encoding="utf-8") as answer,
    ):
        for command in commands:
            out = log if command[0] == "run" else answer
            if (code := children.run(command, log.fileno(), out.fileno())) != 0:
                return _failed(folder, code)
    result = _result(config, cell, cache, commands)
    _write_json(folder / "result.json", result)
    (folder / "failed.txt").unlink(missing_ok=True)
    return f"accuracy {result['evaluation']['answers']['accuracy']:.1%}"


def _failed(folder: Path, code: int) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    reason = f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
    (folder / "failed.txt").write_text(reason + "\n", encoding="utf-8")
    return f"FAILED ({reason}); see {folder / 'log.txt'}"


def _result(
    config: SweepConfig, cell: Cell, cache: Cache, commands: Sequence[Sequence[str]]
) -> dict[str, Any]:
    folder = _folder(config, cell)
    result: dict[str, Any] = {
        "cell": cell.name,
        "group": cell.group,
        "kind": cell.kind,
        "seed": cell.seed,
        "options": cell.options,
        "commands": [shlex.join(["train-student", *command]) for command in commands],
        "evaluation": json.loads((folder / "evaluation.json").read_text(encoding="utf-8")),
    }
    if cell.options is not None:
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        run = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))
        result["run"] = json.loads(lines[-1])
        result["student_fingerprint"] = run["student_fingerprint"]
        result["costs"] = span_costs(cache, cell.selection)
    return result


def _folder(config: SweepConfig, cell: Cell) -> Path:
    return config.out / "cells" / cell.name


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


class _Children:
    """The processes of a sweep: SIGINT and SIGTERM reach them, and no further one starts."""

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, arguments: Sequence[str], log: int, stdout: int) -> int:
        """Run `train-student` with these arguments; its exit code, or -1 if it must not start."""
        with self._lock:
            if self.stopped_by:
                return -1
            child = subprocess.Popen(
                [*PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,  # a Ctrl-C would reach it twice
            )
            self._running.add(child)
        code = child.wait()
        with self._lock:
            self._running.discard(child)
        return code

    def _stop(self, number: int, frame: object) -> None:
        self.stopped_by = number
        for child in list(self._running):
            child.terminate()  # a run writes a checkpoint and ends

    def __enter__(self) -> "_Children":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
