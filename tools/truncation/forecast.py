"""A profile's forecast against its outcome: shares before each lead span, and gains kept by runs.

    python tools/truncation/forecast.py profile.json results.csv > forecast.csv

The forecast of a fixed lead span is the share of the untrained student's divergence before it. The
outcome is the share of the gain of whole traces over the untrained student that runs on it kept, as
a mean over seeds: the gain in accuracy of a sweep (its results.csv), or in held-out divergence
(results.csv of heldout.py).
"""

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean


def main() -> None:
    profile = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(sys.argv[2]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    read = _by_accuracy if "accuracy" in rows[0] else _by_divergence
    base, by_span = read(rows)
    gain = mean(by_span[1.0]) - base
    forecasts = {row["lead_span"]: row for row in profile["divergence_before"]}
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["lead_span", "divergence_share", "low", "high", "teacher_entropy_share", "gain_kept"]
    )
    for span, found in sorted(by_span.items()):
        if span in forecasts:
            row = forecasts[span]
            shares = ("divergence_share", "divergence_share_low", "divergence_share_high")
            figures = [row[name] for name in (*shares, "teacher_entropy_share")]
            # Nothing is kept of nothing: a trial of the script gains nothing.
            kept = f"{(mean(found) - base) / gain:.3f}" if gain else ""
            writer.writerow([f"{span:g}", *(f"{figure:.3f}" for figure in figures), kept])


def _by_accuracy(rows: Iterable[Mapping[str, str]]) -> tuple[float, dict[float, list[float]]]:
    """Accuracy of the untrained student, and of the runs on each plain lead span."""
    base, by_span = 0.0, defaultdict(list)
    for row in rows:
        names = ("kind", "sections", "lead_span_of", "loss_on", "loss_dropout")
        is_plain = [row[name] for name in names] == ["span", "all", "trace", "lead", "0.0"]
        if row["kind"] == "base":
            base = float(row["accuracy"])
        elif is_plain and row["lead_span"]:
            by_span[float(row["lead_span"])].append(float(row["accuracy"]))
    return base, by_span


def _by_divergence(rows: Iterable[Mapping[str, str]]) -> tuple[float, dict[float, list[float]]]:
    """The same of the negative held-out divergence, so that more is better."""
    base, by_span = 0.0, defaultdict(list)
    for row in rows:
        if row["run"] == "untrained":
            base = -float(row["kl"])
        elif row["run"].startswith("span-"):
            by_span[float(row["run"].removeprefix("span-"))].append(-float(row["kl"]))
    return base, by_span


if __name__ == "__main__":
    main()
