"""The groups of a sweep against each other at equal cost: same seeds, same prompts.

    python tools/truncation/paired.py SWEEP > paired.csv

Differences of accuracy in points with intervals of 95 % over seeds and prompts; empty where two
groups have fewer than two seeds in common.
"""

import csv
import sys
from pathlib import Path

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import difference
from student_train.sweep.groups import Group, group_cells
from student_train.sweep.results import read_cells

OTHERS = ("half-steps", "half-traces", FULL)


def main() -> None:
    groups = group_cells(
        read_cells(Path(sys.argv[1]), lambda _: {"num_captured": 0.0, "num_positions": 1.0})
    )
    by_name = {group.name: group for group in groups if group.kind != "base"}
    whole = by_name[FULL].mean("run", "flops") or 1.0
    others = [by_name[name] for name in OTHERS if name in by_name]
    columns = [f"less_{other.name}{bound}" for other in others for bound in ("", "_low", "_high")]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["group", "seeds", "flops_share", "accuracy", "low", "high", *columns])
    for group in sorted(by_name.values(), key=lambda group: -group.mean_accuracy):
        row = [group.name, len(group.cells), f"{(group.mean('run', 'flops') or 0) / whole:.3f}"]
        interval = [group.accuracy.low, group.accuracy.high] if group.accuracy else []
        row += [f"{100 * share:.1f}" for share in (group.mean_accuracy, *interval)]
        for other in others:
            row += _difference(groups, group, other)
        writer.writerow(row)


def _difference(groups: list[Group], group: Group, other: Group) -> list[str]:
    mean = None if group is other else difference(groups, group, other)
    if mean is None:
        return ["", "", ""]
    return [f"{100 * points:+.1f}" for points in (mean.value, *mean.interval)]


if __name__ == "__main__":
    main()
