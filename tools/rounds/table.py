"""The arms of rounds as a table, paired by seed and prompt.

    python tools/rounds/table.py answers OUT > answers.csv
    python tools/rounds/table.py table answers.csv

`answers` takes from the folder of `arms.py` a row per run: its arm, seed, cost and distance from
the teacher, and a digit per prompt, 1 where the answer was right. `table` makes of these rows, and
of nothing else, the table of the guide; intervals of 95 % are over seeds and prompts, differences
in points over the seeds that both arms have. The teacher's tokens are those that it read to score
traces.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from student_train.evaluation.intervals import Mean, share_interval

FIGURES = ("flops", "teacher_tokens", "cpu_s", "heldout_kl", "mean_tokens", "staleness")
COMPARED = ("off-policy", "one-scalar", "warm")


def write_answers(out: Path) -> None:
    """Print a row per run."""
    writer = csv.writer(sys.stdout)
    writer.writerow(["arm", "seed", *FIGURES, "own_kl", "right"])
    for line in json.loads((out / "results.json").read_text()):
        file = out / f"seed-{line['seed']}" / line["arm"] / "completions.jsonl"
        samples = [json.loads(row) for row in file.read_text().splitlines()]
        right = {sample["prompt"]: sample["right"] for sample in samples}
        digits = "".join(str(int(right[prompt])) for prompt in sorted(right))
        own = [round(kl, 4) for kl in line.get("own_kl", [])]
        figures = [f"{line[name]:.6g}" if line.get(name) is not None else "" for name in FIGURES]
        writer.writerow([line["arm"], line["seed"], *figures, " ".join(map(str, own)), digits])


def write_table(rows: list[dict[str, str]]) -> None:
    """Print the table, best arm first."""
    arms: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    compared = [arm for arm in COMPARED if arm in arms and len(arms[arm]) > 1]
    heads = [f"less {other}" for other in compared]
    heads += ["held-out KL, nats", "own KL, nats", "GFLOP", "teacher's tokens"]
    print(f"| arm | seeds | right answers, 95 % | {' | '.join(heads)} |")
    print("| --- | --- | --- |" + " --- |" * len(heads))
    for arm, of_seed in sorted(arms.items(), key=lambda item: -_right(item[1]).mean()):
        right_SP = _right(of_seed)
        low, high = share_interval(right_SP)
        cells = [arm, str(len(of_seed)), f"{right_SP.mean():.1%} ({low:.1%} to {high:.1%})"]
        cells += [_difference(of_seed, arms[other]) if other != arm else "" for other in compared]
        rows_S = list(of_seed.values())
        cells += [
            _mean(rows_S, "heldout_kl", ".4f"),
            _own_kl(rows_S),
            _mean(rows_S, "flops", ".0f", 1e-9),
            _mean(rows_S, "teacher_tokens", ",.0f"),
        ]
        print(f"| {' | '.join(cells)} |")


def _mean(rows: list[dict[str, str]], name: str, form: str, scale: float = 1.0) -> str:
    """Mean of a figure over seeds; empty where an arm has none."""
    found = [float(row[name]) * scale for row in rows if row.get(name)]
    return format(np.mean(found), form) if found else ""


def _own_kl(rows: list[dict[str, str]]) -> str:
    """KL(student, teacher) on own traces at the start of each round, means over seeds."""
    found = [[float(kl) for kl in row["own_kl"].split()] for row in rows if row["own_kl"]]
    return ", then ".join(f"{kl:.3f}" for kl in np.mean(found, axis=0)) if found else ""


def _right(of_seed: dict[str, dict[str, str]]) -> NDArray[np.float64]:
    """Right answers [S, P]."""
    return np.array([[float(digit) for digit in row["right"]] for row in of_seed.values()])


def _difference(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> str:
    """Points of accuracy between two arms, over the seeds that both have."""
    seeds = [seed for seed in one if seed in other]
    if len(seeds) < 2:
        return ""
    ours, theirs = (_right({seed: each[seed] for seed in seeds}) for each in (one, other))
    mean = Mean.of(ours - theirs)
    low, high = mean.interval
    return f"{100 * mean.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "answers":
        write_answers(path)
    else:
        with path.open() as file:
            write_table(list(csv.DictReader(file)))
