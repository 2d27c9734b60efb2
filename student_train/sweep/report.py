"""The report of a sweep: results.csv, report.png and report.html, one self-contained page."""

import base64
import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from student_train.model.flops import FORMULA
from student_train.sweep.cell_run import sweep_record
from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import COSTS, conclusion, percent, share_of_full
from student_train.sweep.picture import draw
from student_train.sweep.results import (
    CellResult,
    Costs,
    Estimate,
    Group,
    csv_rows,
    group_cells,
    read_cells,
)
from teacher_cache.format import SECTIONS
from teacher_cache.format.checksums import read_record
from teacher_cache.format.files import publish

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
img { max-width: 100%; }
.answer { font-size: 1.15rem; border-left: 4px solid #1f77b4; padding-left: 1rem; }
.failed { color: #a00; }
"""


def write_report(out: Path, header: Mapping[str, Any], costs: Costs) -> str:
    """Write the report of every finished cell of a sweep's folder; return the answer.

    Args:
        out: The sweep's folder.
        header: Provenance of the cache.
        costs: From the options of a cell's run to `span_costs`.

    Raises:
        ValueError: If its cells do not belong together.
    """
    cells = read_cells(out, costs)
    groups = group_cells(cells)
    _write_csv(out / "results.csv", cells)
    draw(groups, out / "report.png")
    sentence = conclusion(groups)
    page = _page(out, cells, groups, sentence, header)
    publish(out / "report.html", page.encode())
    return sentence


def _write_csv(file: Path, cells: Sequence[CellResult]) -> None:
    rows = csv_rows(cells)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    publish(file, target.getvalue().encode())


def _page(
    out: Path,
    cells: Sequence[CellResult],
    groups: Sequence[Group],
    sentence: str,
    header: Mapping[str, Any],
) -> str:
    picture = base64.b64encode((out / "report.png").read_bytes()).decode("ascii")
    facts = sweep_record(out)
    failed = {
        file.parent.name: file.read_text(encoding="utf-8").strip()
        for file in sorted(out.glob("cells/*/failed.txt"))
    }
    failures = "".join(
        f'<p class="failed">Cell {escape(name)} failed: {escape(why)}</p>'
        for name, why in failed.items()
    )
    commands = [command for cell in cells for command in cell.result["commands"]]
    calls = [shlex.join(call) for call in facts["calls"]]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Lead spans of {escape(facts["student"])}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>How much of each trace does {escape(Path(facts["student"]).name)} need?</h1>
<p class="answer">{escape(sentence)}</p>
{failures}
<img alt="Quality and cost against lead span" src="data:image/png;base64,{picture}">
<h2>Quality</h2>
{_quality_table(groups)}
<p>Intervals of 95 %: a bootstrap over prompts, the same for all rows, and a t distribution over
seeds. Retention is accuracy over full-length accuracy; retention of the gain counts from the
untrained student. It is left out where the full-length gain is not above zero for certain.</p>
<h2>By problem group</h2>
{_group_table(groups)}
<h2>Cost</h2>
{_cost_table(groups)}
<p>FLOPs = {escape(FORMULA)}. Memory is the process' growth on a CPU, the allocator's peak on a GPU;
both hold weights and optimizer too. Disk is that of a cache of the bands read. Saved tokens are
those behind the span, which a teacher that stopped there would not generate.{_captured(groups)}
Break-even: runs after which a live teacher would have been run on more tokens than that.</p>
{_flop_table(out / "flops.json")}
<h2>Held-out traces, all of each</h2>
{_heldout_table(groups)}
<h2>Configuration</h2>
<pre>{escape(json.dumps({k: v for k, v in facts.items() if k != "calls"}, indent=1))}</pre>
<h2>Provenance of the cache</h2>
<pre>{escape(json.dumps(dict(header), indent=1))}</pre>
<h2>Commands</h2>
<p>The sweep, and below the runs and evaluations that it started:</p>
<pre>{escape(chr(10).join(calls))}</pre>
<details><summary>{len(commands)} commands</summary>
<pre>{escape(chr(10).join(commands))}</pre></details>
</body></html>
"""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _quality_table(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        row = [group.name.replace("_", " "), str(len(group.cells)), _percent(group.accuracy)]
        row += [_percent(group.retention), _percent(group.gain_retention)]
        row += [
            _number(group.mean("evaluation", "answers", "unfinished_share"), "{:.1%}"),
            _number(group.mean("evaluation", "answers", "mean_tokens"), "{:.1f}"),
        ]
        rows.append(row)
    columns = ["cell", "runs", "accuracy", "retention", "of the gain", "unfinished", "mean tokens"]
    return _table(columns, rows)


def _group_table(groups: Sequence[Group]) -> str:
    names = sorted({n for g in groups for c in g.cells for n in c.result["evaluation"]["groups"]})
    if not names:
        return "<p>The prompts name no group (--group-by).</p>"
    rows = [
        [group.name.replace("_", " ")]
        + [_number(group.mean("evaluation", "groups", n, "accuracy"), "{:.1%}") for n in names]
        for group in groups
    ]
    return _table(["accuracy", *names], rows)


def _cost_table(groups: Sequence[Group]) -> str:
    full = next((group for group in groups if group.name == FULL), None)
    rows = []
    for group in groups:
        if group.kind == "base":
            continue
        row = [group.name.replace("_", " ")]
        row.append(_number(group.mean("run", "tokens_trained"), "{:,.0f}"))
        row.append(_number(group.mean("costs", "cot_share"), "{:.0%}"))
        for _, path in COSTS:
            value = group.mean(*path)
            share = None if full is None else share_of_full(group, full, path)
            row.append(_number(value, "{:.3g}") + (f" ({share:.0%})" if share is not None else ""))
        row.append(_number(group.mean("costs", "cache_bytes"), "{:,.0f}"))
        row.append(_number(group.mean("costs", "tokens_saved"), "{:,.0f}"))
        row.append(_number(group.mean("break_even_runs"), "{:.2f}"))
        rows.append(row)
    columns = ["cell", "tokens trained", "of the CoT", "FLOPs", "peak memory, B", "time, s"]
    columns += ["bytes read", "disk, B", "teacher tokens saved", "break-even, runs"]
    return _table(columns, rows)


def _captured(groups: Sequence[Group]) -> str:
    tokens = {group.mean("costs", "num_captured") for group in groups} - {None}
    return "".join(f" The capture ran the teacher once on {n:,.0f} tokens." for n in tokens)


def _flop_table(file: Path) -> str:
    if not file.exists():
        return ""
    rows = [
        [
            f"{row['lead_span']:g}",
            *(f"{row[name]:,}" for name in ("num_positions", "by_formula", "counted")),
            f"{row['counted'] / row['by_formula']:.3f}",
        ]
        for row in read_record(file, "Remove it: it is made again.")["rows"]
    ]
    columns = ["lead span of one trace", "positions", "by formula", "PyTorch's counter", "ratio"]
    return _table(columns, rows) + "<p>PyTorch counts the masked half of attention too.</p>"


def _heldout_table(groups: Sequence[Group]) -> str:
    sections = (*SECTIONS, "all")
    rows = []
    for group in groups:
        row = [group.name.replace("_", " ")]
        for section in sections:
            for figure in ("kl", "nll"):
                row.append(_number(group.mean("evaluation", "heldout", section, figure), "{:.4f}"))
        if set(row[1:]) != {"-"}:
            rows.append(row)
    if not rows:
        return "<p>Not measured (--heldout-cache).</p>"
    columns = [f"{name} {section}" for section in sections for name in ("KL", "NLL")]
    return _table(["nats per token", *columns], rows)


def _percent(estimate: Estimate | None) -> str:
    return "-" if estimate is None else percent(estimate)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
