"""A profile's forecast against its outcome: shares before each lead span, and gains kept by runs.

    python tools/truncation/forecast.py profile.json results.csv > forecast.csv

The forecast of a fixed lead span is the share of the untrained student's divergence before it; the
outcome is the share of the gain in accuracy, of whole traces over the untrained student, that runs
on it kept, as a mean over seeds.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean


def main() -> None:
    profile = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(sys.argv[2]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    (base,) = {float(row["accuracy"]) for row in rows if row["kind"] == "base"}
    accuracies: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        is_plain = row["sections"] == "all" and row["lead_span_of"] == "trace"
        if row["kind"] == "span" and is_plain and row["lead_span"] and row["loss_on"] == "lead":
            accuracies[float(row["lead_span"])].append(float(row["accuracy"]))
    gain = mean(accuracies[1.0]) - base
    forecasts = {row["lead_span"]: row for row in profile["divergence_before"]}
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["lead_span", "divergence_share", "low", "high", "teacher_entropy_share", "gain_kept"]
    )
    for span, found in sorted(accuracies.items()):
        if span in forecasts:
            row = forecasts[span]
            shares = ("divergence_share", "divergence_share_low", "divergence_share_high")
            figures = [row[name] for name in (*shares, "teacher_entropy_share")]
            kept = (mean(found) - base) / gain
            writer.writerow([f"{span:g}", *(f"{figure:.3f}" for figure in (*figures, kept))])


if __name__ == "__main__":
    main()
