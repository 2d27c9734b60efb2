"""report.md and figures.json in the folder of some rounds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teacher_cache.format.files import publish

_UNKNOWN = "-"
_STAGES = ("rollout", "score", "run", "evaluate")
_HEAD = """# Rounds on the student's own traces

Traces, their length and the KL are those of the student that a round starts from: the KL from it
to the teacher, per token of its own traces, in nats, with its standard error. Accuracy is that of
the student after the round, with 95 % intervals. Seconds are those of the attempt that finished a
stage.
"""


def write_report(out: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write both files; returns the table.

    Args:
        out: The rounds' folder.
        rows: Rows of `figures_of`.
    """
    table = "\n".join([*_header(), *(_line(row) for row in rows)])
    publish(out / "figures.json", (json.dumps(rows, indent=1) + "\n").encode())
    publish(out / "report.md", f"{_HEAD}\n{table}\n".encode())
    return table


def _header() -> list[str]:
    columns = [
        *("round", "accuracy after", "KL to teacher", "traces", "tokens", "unfinished"),
        *("cache, MB", "steps", "staleness", "train TFLOP", *(f"{name}, s" for name in _STAGES)),
    ]
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def _line(row: dict[str, Any]) -> str:
    own, run, answers = (row.get(name) or {} for name in ("own", "run", "answers"))
    accuracy = _UNKNOWN
    if answers:
        low, high = answers["accuracy_low"], answers["accuracy_high"]
        accuracy = f"{answers['accuracy']:.1%} ({low:.1%} to {high:.1%})"
    kl = _UNKNOWN
    if own.get("kl") is not None:
        kl = f"{own['kl']:.4f} ± {own['kl_error']:.4f}"
    cells = [
        str(row["round"]),
        accuracy,
        kl,
        _shown(own, "num_traces", "{:,}"),
        _shown(own, "mean_tokens", "{:.1f}"),
        _shown(own, "unfinished_share", "{:.1%}"),
        _shown(own, "cache_bytes", "{:.2f}", 1e-6),
        _shown(run, "step", "{:,}"),
        _shown(run, "staleness", "{:.4f}"),
        _shown(run, "flops", "{:.3g}", 1e-12),
        *(_shown(row["seconds"], name, "{:.0f}") for name in _STAGES),
    ]
    return f"| {' | '.join(cells)} |"


def _shown(values: dict[str, Any], name: str, form: str, scale: float | None = None) -> str:
    value = values.get(name)
    if value is None:
        return _UNKNOWN
    return form.format(value if scale is None else value * scale)
