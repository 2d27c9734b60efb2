"""Results of tools/demo as a table: accuracy before and after, and the bytes that were read."""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that tools/demo wrote")
    out = parser.parse_args().out
    rows = [("student", "right", "95 % interval", "unfinished", "bytes read", "tokens trained")]
    bytes_read = {}
    for name, label in (
        ("base-student", "base student"),
        ("run-1.0", "distilled, lead span 1.0"),
        ("run-0.5", "distilled, lead span 0.5"),
    ):
        score = json.loads((out / f"{name}.json").read_text())["answers"]
        read, tokens = "-", "-"
        if (out / name / "metrics.jsonl").exists():
            lines = (out / name / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            bytes_read[name] = steps[-1]["bytes_read"]
            read, tokens = f"{bytes_read[name]:,}", f"{sum(s['tokens'] for s in steps):,}"
        low, high = score["accuracy_low"], score["accuracy_high"]
        rows.append(
            (
                label,
                f"{score['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{score['unfinished_share']:.1%}",
                read,
                tokens,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    share = bytes_read["run-0.5"] / bytes_read["run-1.0"]
    print(f"\nlead span 0.5 read {share:.1%} of the bytes that lead span 1.0 read")


if __name__ == "__main__":
    main()
