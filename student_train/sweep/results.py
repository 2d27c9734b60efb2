"""What the cells of a sweep found: a row per run, and what each group of seeds keeps of the gain.

Letters: S seeds, P prompts, R draws of the bootstrap.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.sweep.cells import FULL
from teacher_cache.format.checksums import DamagedFileError, read_record, sha256_of

NUM_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval of 95 %."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws_R: NDArray[np.float64]) -> "Estimate":
        """The percentiles of draws as the interval."""
        low, high = np.percentile(draws_R, [2.5, 97.5])
        return cls(value, float(low), float(high))


@dataclass(frozen=True)
class CellResult:
    """One finished cell."""

    result: Mapping[str, Any]  # result.json
    right_P: NDArray[np.float64]  # share of right samples of each prompt

    @property
    def group(self) -> str:
        """Cells that differ in the seed alone have one."""
        return str(self.result["group"])


@dataclass(frozen=True)
class Group:
    """The cells of one group."""

    name: str
    cells: tuple[CellResult, ...]
    accuracy: Estimate
    retention: Estimate | None  # accuracy / full-length accuracy, the paper's
    gain_retention: Estimate | None  # of the gain over the untrained student

    @property
    def options(self) -> Mapping[str, Any]:
        """Of its runs, the seed apart."""
        return self.cells[0].result["options"] or {}

    @property
    def kind(self) -> str:
        """`span` or a baseline."""
        return str(self.cells[0].result["kind"])

    @property
    def is_plain_span(self) -> bool:
        """A point of the curve: a lead span of every trace and nothing else changed."""
        return self.kind == "span" and list(self.options) == ["lead_span"]

    def mean(self, *path: str) -> float | None:
        """Mean over seeds of a figure of result.json; None where a cell lacks it."""
        values = []
        for cell in self.cells:
            value: Any = cell.result
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            values.append(value)
        return None if None in values else sum(values) / len(values)


Costs = Callable[[Mapping[str, Any]], Mapping[str, float]]


def read_cells(out: Path, costs: Costs) -> list[CellResult]:
    """Every finished cell of a sweep's folder, by name.

    Args:
        out: The folder.
        costs: From the options of a cell's run to `span_costs`.

    Raises:
        DamagedFileError: If a cell's figures or completions are not what was written.
        OSError: If a file is missing.
        ValueError: If they started from different students or answered different prompts.
    """
    cells = []
    for file in sorted(out.glob("cells/*/result.json")):
        remedy = (
            f"Restore it from a copy; or remove {file} and run the same sweep again, which has "
            "the student of this cell and evaluates it again."
        )
        result = read_record(file, remedy)
        if result["options"] is not None:
            result["costs"] = costs({**result["options"], "seed": result["seed"]})
            result["break_even_runs"] = break_even_runs(result)
        completions = file.with_name("completions.jsonl")
        if sha256_of(completions) != result["completions_sha256"]:
            raise DamagedFileError(f"{completions}: damaged. {remedy}")
        cells.append(CellResult(result, _right(completions)))
    students = {cell.result.get("student_fingerprint") for cell in cells} - {None}
    if len(students) > 1:
        raise ValueError(f"{out}: its cells started from {len(students)} different students")
    if len({len(cell.right_P) for cell in cells}) > 1:
        raise ValueError(f"{out}: its cells answered different numbers of prompts")
    return cells


def _right(completions: Path) -> NDArray[np.float64]:
    verdicts: dict[int, list[bool]] = {}
    for line in completions.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        verdicts.setdefault(sample["prompt"], []).append(sample["right"])
    return np.array([np.mean(verdicts[prompt]) for prompt in sorted(verdicts)], np.float64)


def group_cells(cells: Sequence[CellResult]) -> list[Group]:
    """Groups with accuracies and, where there is a full-length one, retentions.

    Intervals come from a bootstrap: prompts are drawn anew, the same for all groups, and the mean
    over S seeds varies as s / sqrt(S) times a t with S - 1 degrees of freedom, s being the standard
    deviation between seeds. With one seed they tell of the prompts alone. There is no retention
    where the interval of what it is a part of includes zero.
    """
    by_name: dict[str, list[CellResult]] = {}
    for cell in cells:
        by_name.setdefault(cell.group, []).append(cell)
    rng = np.random.default_rng(0)
    if not cells:
        return []
    num_prompts = len(cells[0].right_P)
    weight_RP = rng.multinomial(num_prompts, [1 / num_prompts] * num_prompts, NUM_DRAWS)
    draws = {name: _draws(own, weight_RP / num_prompts, rng) for name, own in by_name.items()}
    means = {name: float(np.mean([c.right_P for c in own])) for name, own in by_name.items()}
    groups = []
    for name, own in by_name.items():
        retention = gain_retention = None
        if FULL in by_name:
            retention = _ratio(means[name], means[FULL], draws[name], draws[FULL])
        if FULL in by_name and "base" in by_name:
            base, base_R = means["base"], draws["base"]
            gain_retention = _ratio(
                means[name] - base, means[FULL] - base, draws[name] - base_R, draws[FULL] - base_R
            )
        accuracy = Estimate.of(means[name], draws[name])
        groups.append(Group(name, tuple(own), accuracy, retention, gain_retention))
    return sorted(groups, key=_place)


def _draws(
    cells: Sequence[CellResult], weight_RP: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """[R] accuracies that the group might have had."""
    right_SP = np.stack([cell.right_P for cell in cells])
    draws_R: NDArray[np.float64] = weight_RP @ right_SP.mean(axis=0)
    num_seeds = len(cells)
    if num_seeds > 1:
        spread = right_SP.mean(axis=1).std(ddof=1) / num_seeds**0.5
        draws_R = draws_R + spread * rng.standard_t(num_seeds - 1, len(draws_R))
    return draws_R.clip(0.0, 1.0)


def _ratio(
    value: float, whole: float, draws_R: NDArray[np.float64], whole_R: NDArray[np.float64]
) -> Estimate | None:
    """Value / whole; None where the interval of the whole includes zero."""
    if np.percentile(whole_R, 2.5) <= 0:
        return None
    some = whole_R > 0
    return Estimate.of(value / whole, draws_R[some] / whole_R[some])


def _place(group: Group) -> tuple[int, float, str]:
    """The untrained student, the curve, other spans, baselines."""
    options = group.options
    if group.kind == "base":
        return 0, 0.0, group.name
    if group.kind != "span":
        return 3, 0.0, group.name
    length = options.get("lead_span", options.get("trace_tokens", 0))
    return 1 if group.is_plain_span else 2, float(length), group.name


def csv_rows(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """A row per cell; what a cell does not have is empty."""
    return [_csv_row(cell.result) for cell in cells]


def _csv_row(result: Mapping[str, Any]) -> dict[str, Any]:
    options = result["options"] or {}
    is_trained = result["options"] is not None
    evaluation, run = result["evaluation"], result.get("run", {})
    answers, costs = evaluation["answers"], result.get("costs", {})
    heldout = evaluation["heldout"]
    whole = 1.0 if is_trained and "trace_tokens" not in options else ""
    row = {
        "cell": result["cell"],
        "kind": result["kind"],
        "lead_span": options.get("lead_span", whole),
        "trace_tokens": options.get("trace_tokens", ""),
        "sections": "+".join(options.get("sections", ("all",))) if is_trained else "",
        "loss_on": options.get("loss_on", "lead") if is_trained else "",
        "lead_span_of": options.get("lead_span_of", "trace") if is_trained else "",
        "loss_dropout": options.get("loss_dropout", 0.0) if is_trained else "",
        "seed": "" if result["seed"] is None else result["seed"],
        **{name: answers[name] for name in ("accuracy", "accuracy_low", "accuracy_high")},
        **{name: answers[name] for name in ("mean_tokens", "unfinished_share", "unclosed_share")},
        "heldout_kl": heldout.get("all", {}).get("kl", ""),
        "heldout_nll": heldout.get("all", {}).get("nll", ""),
        "steps": run.get("step", ""),
        "tokens": run.get("tokens_trained", ""),
        "bytes_read": run.get("bytes_read", ""),
        "flops": run.get("flops", ""),
        "peak_memory_bytes": run.get("peak_memory_bytes", ""),
        "wall_s": run.get("train_s", ""),
        "mean_lead_span": costs.get("mean_lead_span", ""),
        "whole_trace_share": costs.get("whole_trace_share", ""),
        "cot_share": costs.get("cot_share", ""),
        "cache_bytes": costs.get("cache_bytes", ""),
        "teacher_tokens_saved": costs.get("tokens_saved", ""),
        "break_even_runs": result.get("break_even_runs", ""),
    }
    for name, figures in heldout.items():
        if name != "all":
            row |= {f"heldout_kl_{name}": figures["kl"], f"heldout_nll_{name}": figures["nll"]}
    for name, figures in evaluation["groups"].items():
        row[f"accuracy_{name}"] = figures["accuracy"]
    return row


def break_even_runs(result: Mapping[str, Any]) -> float:
    """After how many such runs the capture has cost the teacher less than standing beside them.

    Tokens of the whole capture, prompts included, over the tokens that a live teacher would be run
    on in one run. The traces themselves are needed in any case.
    """
    costs = result["costs"]
    return float(costs["num_captured"] / (costs["num_positions"] * result["run"]["epoch"]))
