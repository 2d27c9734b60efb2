"""Errors of truncated students: in the arithmetic, or in the decision to stop?

    python tools/truncation/endings.py SWEEP PROMPTS > endings.csv

Reads the completions of a sweep on the tiny teacher's task. A trace of n prices has n - 1
additions; a student that continues after the last one spoils a sum that was right.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

RESULT = re.compile(r"(?:, so |, makes |, gives )(\d+)")


def main() -> None:
    sweep, prompts = Path(sys.argv[1]), Path(sys.argv[2])
    problems = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    counts: dict[str, list[dict[str, float]]] = defaultdict(list)
    for file in sorted(sweep.glob("cells/*/result.json")):
        group = json.loads(file.read_text(encoding="utf-8"))["group"]
        lines = file.with_name("completions.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            sample = json.loads(line)
            problem = problems[sample["prompt"]]
            counts[group].append(_outcome(sample, problem["answer"], problem["operands"]))
    names = ["right", "sum_reached", "too_many_additions", "too_few_additions"]
    sizes = sorted({problem["operands"] for problem in problems})
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["group", "samples", *names, *(f"too_many_of_{size}" for size in sizes)])
    for group, outcomes in sorted(counts.items()):
        row = [_share([o[name] for o in outcomes]) for name in names]
        by_size = [
            _share([o["too_many_additions"] for o in outcomes if o["size"] == size])
            for size in sizes
        ]
        writer.writerow([group, len(outcomes), *row, *by_size])


def _outcome(sample: dict, answer: str, size: int) -> dict[str, float]:
    sums = RESULT.findall(sample["completion"]["text"])
    return {
        "right": sample["right"],
        "sum_reached": sums[size - 2 : size - 1] == [answer],  # after the last addition needed
        "too_many_additions": len(sums) > size - 1,
        "too_few_additions": len(sums) < size - 1,
        "size": size,
    }


def _share(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f}"


if __name__ == "__main__":
    main()
