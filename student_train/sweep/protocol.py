"""`train-student sweep`: the cells to run, and the report of all finished ones.

OUT/sweep.json      facts that all cells share, and the calls that were made
OUT/flops.json      FLOPs by formula and as PyTorch counts them
OUT/cells/NAME/     a cell; see cell_run
OUT/w0of1.lock      held by a worker at work here
OUT/results.csv, report.html, compare.html
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from student_train.data.draw import draw_spans
from student_train.data.tails import require_tails_to_measure
from student_train.data.tokens import TokenSelection
from student_train.data.traces import CacheTraces, open_data
from student_train.errors import InterruptedRunError
from student_train.evaluation.checker import Checker
from student_train.evaluation.golds import check_golds
from student_train.evaluation.prompts import (
    Prompt,
    prompt_ids,
    prompts_fingerprint,
    read_prompts,
    seen_in,
)
from student_train.model.flops import compare_flops, count_parameters
from student_train.model.load import load_tokenizer
from student_train.run.config import TrainConfig
from student_train.sweep.at_work import CellsAtWork
from student_train.sweep.cell_run import Children, cell_folder, is_finished, run_cell, sweep_record
from student_train.sweep.cells import FULL, Cell
from student_train.sweep.config import SweepConfig
from student_train.sweep.costs import span_costs
from student_train.sweep.report import write_report
from student_train.sweep.results import Costs
from teacher_cache.format import Cache, open_cache, parse_worker
from teacher_cache.format.checksums import publish_record
from teacher_cache.format.folder_lock import FolderLock
from teacher_cache.terminal.config_file import fields_of_json
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger(__name__)

_LARGEST_COUNTED = 1e9  # parameters


@dataclass(frozen=True)
class SweepResult:
    """Result of a call."""

    num_finished: int  # cells of this call, those of earlier calls included
    failed: tuple[str, ...]  # names
    answer: str  # of all cells of the folder


def run_sweep(config: SweepConfig) -> SweepResult:
    """Run every cell that is not finished yet; a cell that fails does not stop the others.

    Raises:
        CacheError: If a cache cannot be read.
        ValueError: If the settings do not fit each other, the cache or the folder, or evaluation
            prompts were trained on.
        DamagedFileError: If a file of the sweep itself is damaged.
        InUseError: If another process is this worker of the sweep.
        InterruptedRunError: After SIGINT or SIGTERM; the runs in progress have stopped.
    """
    source = _source(config, {})
    cache = source.cache
    cells = list(config.cells(config.num_steps(len(source.train))))
    if not cells:
        raise ValueError("nothing to run: no lead span, token budget or baseline is named")
    _check_cells(config, cells, cache)
    prompts = list(read_prompts(config.eval_prompts, config.eval_options.get("group_by")))
    if not prompts:
        raise ValueError(f"{config.eval_prompts}: expected at least one prompt, found none")
    with Progress("checking the prompts"):
        with Checker() as checker:
            check_golds(prompts, checker)  # not only when the first run is to be evaluated
        if not config.allow_seen_prompts:
            _refuse_seen_prompts(config, prompts, cache)
    mine = _part(cells, config.worker)
    worker, _ = parse_worker(config.worker)
    with FolderLock(config.out / f"{worker}.lock", owned=config.out):
        return _run_and_report(config, cache, prompts, cells, mine)


def _run_and_report(
    config: SweepConfig,
    cache: Cache,
    prompts: Sequence[Prompt],
    cells: Sequence[Cell],
    mine: Sequence[Cell],
) -> SweepResult:
    with _alone(config):
        _describe(config, cache, prompts)
    unfinished = [cell for cell in mine if not is_finished(config, cell)]
    where = "" if len(mine) == len(cells) else f" (worker {config.worker})"
    logger.info("%d cells, %d of them to run here%s", len(cells), len(unfinished), where)
    if not any(cell.group == FULL for cell in cells) and not _has_group(config, FULL):
        logger.warning(
            "no full-length cell: retention has no base and is left out; add 1.0 to --lead-spans "
            "or full to --baselines"
        )
    costs = _remembering(partial(_costs, config))

    def report(num_unfinished: int = 0) -> str:
        header = cache.header.to_json()
        return write_report(config.out, header, costs, num_unfinished=num_unfinished)

    def report_so_far() -> None:
        try:
            with _alone(config):
                report(sum(not is_finished(config, cell) for cell in cells))
        except ValueError as error:  # raised again at the end; no cell may be lost
            logger.warning("the report was not updated: %s", error)

    if unfinished:
        report_so_far()  # from the beginning there is a page to look at
    _run_all(config, unfinished, report_so_far)
    left = [cell for cell in cells if not is_finished(config, cell)]
    failed = tuple(c.name for c in left if cell_folder(config, c).joinpath("failed.txt").exists())
    with _alone(config):
        _compare_flops(config, cache)
        answer = report()
    return SweepResult(len(cells) - len(left), failed, answer)


def _alone(config: SweepConfig) -> FolderLock:
    """Lock with which workers that share a folder take turns at writing the same files."""
    return FolderLock(config.out / "sweep.lock", wait=True)


def _source(config: SweepConfig, options: Mapping[str, Any]) -> CacheTraces:
    """Traces that a run with these options trains on."""
    run = config.train_config(options)
    data = open_data(
        run.cache,
        where=run.where,
        trace_fields=run.trace_fields,
        heldout_share=run.heldout_share,
        allow_unsealed=run.allow_unsealed,
    )
    return data.sources[0]


def _costs(config: SweepConfig, options: Mapping[str, Any]) -> dict[str, float]:
    typed = fields_of_json(TrainConfig, options)
    run = config.train_config(typed)
    return span_costs(draw_spans(_source(config, typed), run.selection, run.seed))


def _remembering(costs: Costs) -> Costs:
    """Count every cell's costs once: a large cache has many commit records to go through."""
    known: dict[str, Mapping[str, float]] = {}

    def counted(options: Mapping[str, Any]) -> Mapping[str, float]:
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            known[key] = costs(options)
        return known[key]

    return counted


def _check_cells(config: SweepConfig, cells: Sequence[Cell], cache: Cache) -> None:
    for cell in cells:
        if cell.options is not None:
            config.train_config(cell.options)
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
            f"{config.eval_prompts}: {len(seen):,} of {len(prompts):,} prompts are in the "
            f"training cache {cache.path} (the first is prompt {seen[0] + 1}: "
            f"{prompt.text or prompt.messages}). Use others, or --allow-seen-prompts."
        )


def _describe(config: SweepConfig, cache: Cache, prompts: Sequence[Prompt]) -> None:
    """Write the facts that all cells share, or check them against those of the folder's cells."""
    heldout = None if config.heldout_cache is None else open_cache(config.heldout_cache)
    if heldout is not None:
        require_tails_to_measure(heldout)
    facts: dict[str, Any] = {
        "cache": cache.path,
        "cache_fingerprint": cache.fingerprint,
        "student": config.student,
        "train_options": config.train_options,
        "eval_prompts": str(config.eval_prompts),
        "eval_prompts_fingerprint": prompts_fingerprint(prompts),
        "heldout_cache": config.heldout_cache,
        "heldout_cache_fingerprint": None if heldout is None else heldout.fingerprint,
        "eval_options": config.eval_options,
    }
    facts = json.loads(json.dumps(facts, default=str))  # as the file gives them back
    file = config.out / "sweep.json"
    if file.exists():
        before = sweep_record(config.out)
        moved = {"cache", "student", "eval_prompts", "heldout_cache"}  # they may have moved
        calls = before.get("calls", [])
        for name in facts.keys() - moved:
            if before.get(name) != facts[name]:
                raise ValueError(
                    f"{config.out} holds another sweep ({name}: {before.get(name)!r} before, "
                    f"{facts[name]!r} now). Name another --out, or repeat that sweep's settings."
                )
        if config.command() not in calls:
            publish_record(file, {**before, "calls": [*calls, config.command()]})
        return
    if any(path.suffix != ".lock" for path in config.out.iterdir()):
        raise ValueError(f"{config.out}: expected an empty folder or a sweep's, found other files")
    publish_record(file, {**facts, "calls": [config.command()]})


def _part(cells: Sequence[Cell], worker: str) -> Sequence[Cell]:
    _, part = parse_worker(worker)
    if part is None:
        raise ValueError(f"worker: expected i/n, got {worker!r}")
    return cells[part.index :: part.count]


def _has_group(config: SweepConfig, group: str) -> bool:
    return any((config.out / "cells").glob(f"{group}_seed-*/result.json"))


def _run_all(config: SweepConfig, cells: Sequence[Cell], after_each: Callable[[], None]) -> None:
    at_work = CellsAtWork()
    shown = Progress("finished", len(cells), "cells", watch=at_work.described)

    def run(cell: Cell, children: Children) -> str:
        with at_work.of(cell.name, cell_folder(config, cell) / "log.txt"):
            return run_cell(config, cell, children)

    with Children() as children, ThreadPoolExecutor(config.num_parallel) as pool, shown:
        running = {pool.submit(run, cell, children): cell for cell in cells}
        for number, done in enumerate(as_completed(running), start=1):
            if children.stopped_by:
                continue
            shown.set(number)
            logger.info("%d/%d %s: %s", number, len(cells), running[done].name, done.result())
            after_each()
        if children.stopped_by:  # inside, so that no last line of progress comes between
            raise InterruptedRunError(
                "stopped; run the same command again to resume", children.stopped_by
            )


def _compare_flops(config: SweepConfig, cache: Cache) -> None:
    """Write, once per sweep, the formula's FLOPs beside those that PyTorch counts."""
    file = config.out / "flops.json"
    if file.exists():
        return
    spans = {span: TokenSelection(span) for span in sorted({*config.lead_spans, 1.0})}
    if count_parameters(config.student) > _LARGEST_COUNTED:
        logger.info("FLOPs come from the formula alone: the student is too large to count on a CPU")
        return
    compared = compare_flops(config.student, cache, list(spans.values()))
    rows = [{"lead_span": span, **asdict(c)} for span, c in zip(spans, compared, strict=True)]
    publish_record(file, {"rows": rows})
