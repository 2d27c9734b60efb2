"""Runs compared by their distance from the teacher on held-out traces, token by token.

    python tools/truncation/heldout.py measure MODEL CACHE > measured.json
    python tools/truncation/heldout.py table OUT > results.csv
    python tools/truncation/heldout.py paired OUT > paired.csv
    python tools/truncation/heldout.py picture OUT > curve.svg

OUT holds untrained.json and teacher.json, and runs/NAME_seed-N/ with result.json of the run and
measured.json. Letters: S seeds, P held-out traces.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np


def print_measurements(name: str, path: str) -> None:
    """Print a model's sums on every held-out trace, by section: KL and NLL in nats."""
    import torch

    from student_train.model.forward import StudentWithLoss
    from student_train.model.heldout import heldout_sums
    from student_train.model.load import head_of, load_model
    from teacher_cache.format import SECTIONS, open_cache

    model, tokenizer = load_model(name, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = StudentWithLoss(model, head_of(model)).to(device).eval()
    traces = []
    for trace in open_cache(path):
        sums = heldout_sums(student, [trace], device)
        section = trace.section_of_token.copy()
        section[0] = -1  # the first token has no distribution
        for index, (num_tokens, kl, nll, top1) in enumerate(sums.tolist()):
            text = tokenizer.decode(trace.token_ids[section == index])
            row = {"trace_id": trace.trace_id, "section": SECTIONS[index]}
            row |= {"num_tokens": int(num_tokens), "num_bytes": len(text.encode())}
            traces.append(row | {"kl": kl, "nll": nll, "top1": top1})
    print(json.dumps({"model": name, "traces": [row for row in traces if row["num_tokens"]]}))


def _figures(measured: dict[str, Any], section: str | None) -> dict[str, float]:
    """Means over a section of all traces, or over all of them."""
    rows = [row for row in measured["traces"] if section in (None, row["section"])]
    names = ("num_tokens", "num_bytes", "kl", "nll", "top1")
    total = {name: sum(row[name] for row in rows) for name in names}
    return {
        "kl": total["kl"] / total["num_tokens"],
        "bits_per_byte": total["nll"] / math.log(2) / total["num_bytes"],
        "top1": total["top1"] / total["num_tokens"],
    }


def _runs(out: str) -> list[tuple[str, int | None, float, dict[str, Any]]]:
    """Name, seed, FLOPs and measurements of the untrained student, every run and the teacher."""
    found: list[tuple[str, int | None, float, dict[str, Any]]] = []
    for file in sorted(Path(out).glob("runs/*/measured.json")):
        name, seed = file.parent.name.rsplit("_seed-", 1)
        result = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))
        found.append((name, int(seed), result["metrics"]["flops"], _read(file)))
    ends = [
        (name, None, 0.0, _read(Path(out, f"{name}.json"))) for name in ("untrained", "teacher")
    ]
    return [ends[0], *found, ends[1]]


def _read(file: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def print_table(out: str) -> None:
    """Print a row per run: its cost, and its figures on all held-out tokens and by section."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = ("kl", "bits_per_byte", "top1")
    sections = {row["section"]: None for row in _runs(out)[0][3]["traces"]}
    parts = {"": None, **{f"_{section}": section for section in sections}}
    columns = [f"{name}{part}" for part in parts for name in names]
    writer.writerow(["run", "seed", "gflop", *columns])
    for name, seed, flops, measured in _runs(out):
        figures = [_figures(measured, section) for section in parts.values()]
        values = [f"{own[column]:.4f}" for own in figures for column in names]
        writer.writerow([name, "" if seed is None else seed, f"{flops / 1e9:.0f}", *values])


def _kl_SP(out: str, name: str) -> np.ndarray:
    """[S, P] mean KL of each held-out trace, by seed."""
    by_seed = []
    for found, seed, _, measured in _runs(out):
        if found != name or seed is None:
            continue
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in measured["traces"]:
            sums[row["trace_id"]][0] += row["kl"]
            sums[row["trace_id"]][1] += row["num_tokens"]
        by_seed.append([kl / num_tokens for kl, num_tokens in sums.values()])
    return np.array(by_seed)


def print_paired(out: str) -> None:
    """Print every group's held-out KL less that of half the steps: same seeds, same traces."""
    from student_train.evaluation.intervals import Mean

    groups: dict[str, list[float]] = defaultdict(list)
    for name, seed, flops, _ in _runs(out):
        if seed is not None:
            groups[name].append(flops)
    whole = sum(groups["span-1"]) / len(groups["span-1"])
    other_SP = _kl_SP(out, "half-steps")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "seeds", "flops_share", "kl", "less_half_steps", "low", "high"])
    for name, flops in sorted(groups.items(), key=lambda pair: sum(pair[1]) / len(pair[1])):
        own_SP = _kl_SP(out, name)
        seeds = min(len(own_SP), len(other_SP))
        row = [name, seeds, f"{sum(flops) / len(flops) / whole:.3f}", f"{own_SP.mean():.4f}"]
        if name != "half-steps":
            less = Mean.of(own_SP[:seeds] - other_SP[:seeds])
            row += [f"{value:+.4f}" for value in (less.value, *less.interval)]
        writer.writerow(row)


_COLOURS = ("#0b62c4", "#b45309", "#1a7f37", "#8e3fb0", "#b3261e", "#0f7f86", "#6b5b00", "#5c5c63")


def print_picture(out: str) -> None:
    """Print held-out KL against FLOPs, a point for every run, as SVG."""
    from teacher_cache.pages.charts import Series, line_chart

    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, seed, flops, measured in _runs(out):
        if seed is not None:
            groups[name].append((flops / 1e9, _figures(measured, None)["kl"]))
    series = [Series(name, *zip(*points, strict=True)) for name, points in groups.items()]
    chart = line_chart("", "training, GFLOP", "KL to the teacher, nats per token", series)
    height = 270 + 16 * len(groups)
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {height}" '
        'font-family="sans-serif" font-size="12"><rect width="400" height="100%" fill="#fff"/>'
        '<path d="M52 10V212H390" fill="none" stroke="#5c5c63"/>'
        f'<text x="221" y="246" text-anchor="middle">{chart.x_label}</text>'
        f'<text transform="rotate(-90 12 111)" x="12" y="111" text-anchor="middle">'
        f"{chart.y_label}</text>"
    )
    for tick in chart.x_ticks:
        print(f'<text x="{tick.place}" y="228" text-anchor="middle">{tick.text}</text>')
    for tick in chart.y_ticks:
        print(f'<text x="47" y="{tick.place + 4}" text-anchor="end">{tick.text}</text>')
    for number, curve in enumerate(chart.curves):
        colour = _COLOURS[curve.number]
        for x, y in curve.points:
            print(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        print(f'<text x="52" y="{266 + 16 * number}" fill="{colour}">\u25cf {curve.name}</text>')
    print("</svg>")


def main() -> None:
    match sys.argv[1:]:
        case ["measure", model, cache]:
            print_measurements(model, cache)
        case ["table", out]:
            print_table(out)
        case ["paired", out]:
            print_paired(out)
        case ["picture", out]:
            print_picture(out)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
