"""Results of the cells of a sweep, read from its folder, and a table row for each.

Letter: P prompts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.checksums import DamagedFileError, read_record, sha256_of


@dataclass(frozen=True)
class CellResult:
    """One finished cell."""

    result: Mapping[str, Any]  # result.json
    right_P: NDArray[np.float64] | None  # share of right samples of each prompt, if that is known

    @property
    def group(self) -> str:
        """Name of the group, shared by cells that differ only in the seed."""
        return str(self.result["group"])

    @property
    def seed(self) -> int | None:
        """Options of its run; None for the untrained student."""
        seed = self.result["seed"]
        return None if seed is None else int(seed)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.result["evaluation"]["answers"]["accuracy"])


Costs = Callable[[Mapping[str, Any]], Mapping[str, float]]


def read_cells(out: Path, costs: Costs) -> list[CellResult]:
    """Every finished cell of a sweep's folder, by name.

    Args:
        out: Folder of the sweep.
        costs: Function from the options of a cell's run to `span_costs`.

    Raises:
        DamagedFileError: If a cell's figures or completions are damaged.
        ValueError: If cells started from different students or answered different prompts.
    """
    cells = []
    for file in sorted(out.glob("cells/*/result.json")):
        remedy = (
            f"Restore it from a copy; or remove {file} and completions.jsonl beside it and run the "
            "same sweep again, which has the student of this cell and evaluates it again."
        )
        result = read_record(file, remedy)
        if result["options"] is not None:
            result["costs"] = costs({**result["options"], "seed": result["seed"]})
            result["break_even_runs"] = break_even_runs(result)
        completions = file.with_name("completions.jsonl")
        right_P = None
        if completions.exists():
            if sha256_of(completions) != result["completions_sha256"]:
                raise DamagedFileError(f"{completions}: damaged. {remedy}")
            right_P = _right(completions)
        cells.append(CellResult(result, right_P))
    students = {cell.result.get("student_fingerprint") for cell in cells} - {None}
    if len(students) > 1:
        raise ValueError(f"{out}: its cells started from {len(students)} different students")
    if len({len(cell.right_P) for cell in cells if cell.right_P is not None}) > 1:
        raise ValueError(f"{out}: its cells answered different numbers of prompts")
    return cells


def _right(completions: Path) -> NDArray[np.float64]:
    verdicts: dict[int, list[bool]] = {}
    for line in completions.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        verdicts.setdefault(sample["prompt"], []).append(sample["right"])
    return np.array([np.mean(verdicts[prompt]) for prompt in sorted(verdicts)], np.float64)


def csv_rows(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """A row per cell; missing values are empty."""
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
    """Number of such runs after which the capture has cost less than a live teacher.

    Tokens of the whole capture, prompts included, over the tokens that a live teacher would
    process in one run. The traces themselves are needed in any case.
    """
    costs = result["costs"]
    return float(costs["num_captured"] / (costs["num_positions"] * result["run"]["epoch"]))
