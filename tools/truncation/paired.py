"""Groups of runs against each other at equal cost: same seeds, same prompts.

    python tools/truncation/paired.py answers FOLDER ... > answers.csv
    python tools/truncation/paired.py paired answers.csv > paired.csv
    python tools/truncation/paired.py picture paired.csv > accuracy.svg

`answers` collects, from sweeps or folders laid out like them (cells/GROUP_seed-N/ with
completions.jsonl and run/result.json), a row per run: its group, seed and FLOPs, and a digit per
prompt, 1 where the answer was right. `paired` makes of these rows, and of nothing else, accuracies
and their differences in points, with intervals of 95 % over seeds and prompts; a difference is
empty where two groups have fewer than two seeds in common.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import difference
from student_train.sweep.groups import Group, group_cells
from student_train.sweep.results import CellResult

OTHERS = ("half-steps", "half-traces", FULL, "mix-0.375x4+1x1")
_SEED = "_seed-"
_INTERVAL = ("accuracy", "low", "high")
# Names where a group's own is too long for a picture.
_SHORT = {"mix-" + "+".join(f"0.{n}x1" for n in range(1, 10)): "random spans 0.1 to 0.9"}


def answer_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A row per finished run; a prompt that was answered more than once is refused."""
    for file in sorted(folder.glob("cells/*/completions.jsonl")):
        if not is_finished(file.parent):
            continue
        group, _, seed = file.parent.name.partition(_SEED)
        lines = file.read_text(encoding="utf-8").splitlines()
        right = {sample["prompt"]: sample["right"] for sample in map(json.loads, lines)}
        if len(right) != len(lines):
            sys.exit(f"{file}: expected one answer to every prompt")
        record = file.parent / "run" / "result.json"
        flops = json.loads(record.read_text())["metrics"]["flops"] if record.exists() else 0
        digits = "".join(str(int(right[prompt])) for prompt in sorted(right))
        yield {"group": group, "seed": seed, "flops": f"{flops:.6g}", "right": digits}


def is_finished(cell: Path) -> bool:
    """Whether a run was evaluated to the end."""
    evaluation = cell / "evaluation.json"
    return evaluation.exists() and evaluation.stat().st_size > 0


def cell_of(row: dict[str, str]) -> CellResult:
    """A row of answers.csv as the sweep's own figures take it."""
    right_P = np.array([int(digit) for digit in row["right"]], np.float64)
    result = {
        "group": row["group"],
        "kind": "span" if row["seed"] else "base",
        "seed": int(row["seed"]) if row["seed"] else None,
        "options": {},
        "run": {"flops": float(row["flops"])},
        "evaluation": {"answers": {"accuracy": float(right_P.mean())}},
    }
    return CellResult(result, right_P)


def print_answers(folders: list[str]) -> None:
    writer = csv.DictWriter(sys.stdout, ("group", "seed", "flops", "right"), lineterminator="\n")
    writer.writeheader()
    for folder in folders:
        writer.writerows(answer_rows(Path(folder)))


def print_paired(file: str) -> None:
    with Path(file).open(encoding="utf-8", newline="") as lines:
        groups = group_cells([cell_of(row) for row in csv.DictReader(lines)])
    by_name = {group.name: group for group in groups}
    whole = by_name[FULL].mean("run", "flops") or 1.0
    others = [by_name[name] for name in OTHERS if name in by_name]
    columns = [f"less_{other.name}{bound}" for other in others for bound in ("", "_low", "_high")]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["group", "seeds", "flops_share", "accuracy", "low", "high", *columns])
    for group in sorted(groups, key=lambda group: -group.mean_accuracy):
        flops_share = (group.mean("run", "flops") or 0) / whole
        row = [group.name, len(group.cells), f"{flops_share:.3f}"]
        interval = [group.accuracy.low, group.accuracy.high] if group.accuracy else []
        row += [f"{100 * share:.1f}" for share in (group.mean_accuracy, *interval)]
        for other in others:
            row += _difference(groups, group, other)
        writer.writerow(row)


def _difference(groups: list[Group], group: Group, other: Group) -> list[str]:
    is_pair = group is not other and group.kind != "base"
    mean = difference(groups, group, other) if is_pair else None
    if mean is None:
        return ["", "", ""]
    return [f"{100 * points:+.1f}" for points in (mean.value, *mean.interval)]


def print_picture(file: str) -> None:
    """Print accuracies with their intervals, the best on top, as SVG."""
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {26 * len(rows) + 44}" '
        'font-family="sans-serif" font-size="12"><rect width="640" height="100%" fill="#fff"/>'
    )
    for percent in range(0, 101, 20):
        x, end = 300 + 3 * percent, 26 * len(rows) + 14
        print(f'<path d="M{x} 8V{end}" stroke="#d8d8de"/>')
        print(f'<text x="{x}" y="{end + 16}" text-anchor="middle">{percent} %</text>')
    for number, row in enumerate(rows):
        y = 24 + 26 * number
        group = _SHORT.get(row["group"], row["group"])
        name = f"{group}, {row['seeds']} x, {100 * float(row['flops_share']):.0f} % of FLOPs"
        value, low, high = (300 + 3 * float(row[key] or row["accuracy"]) for key in _INTERVAL)
        print(f'<text x="290" y="{y + 4}" text-anchor="end">{name}</text>')
        print(f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="#2b5fb4" stroke-width="2"/>')
        print(f'<circle cx="{value:.1f}" cy="{y}" r="4" fill="#2b5fb4"/>')
    print("</svg>")


def main() -> None:
    match sys.argv[1:]:
        case ["answers", *folders] if folders:
            print_answers(folders)
        case ["paired", file]:
            print_paired(file)
        case ["picture", file]:
            print_picture(file)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
