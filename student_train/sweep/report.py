"""The report of a sweep: results.csv, report.png and report.html, one self-contained page."""

import base64
import csv
import io
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from student_train.model.flops import FORMULA
from student_train.sweep import tables
from student_train.sweep.cell_run import sweep_record
from student_train.sweep.conclusion import conclusion
from student_train.sweep.decisions import ENOUGH, decide
from student_train.sweep.groups import Group, group_cells
from student_train.sweep.labels import whole_percent
from student_train.sweep.picture import draw, panels
from student_train.sweep.results import CellResult, Costs, csv_rows, read_cells
from teacher_cache.format.files import publish

_REFRESH_S = 60

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 0 1rem 3rem;
  color: #222; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.answer { font-size: 1.1rem; border-left: 4px solid #1f77b4; padding: .2rem 0 .2rem 1rem; }
.running { background: #fff4d6; padding: .5rem 1rem; } .failed { color: #a00; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; align-items: start; }
.panels img { width: 100%; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  vertical-align: top; }
th { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; min-width: 9rem; position: sticky; left: 0;
  background: #fff; }
td:not(:first-child) { white-space: nowrap; overflow-wrap: normal; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0; } dt { font-weight: 600; }
"""

_WORDS = """<dl>
<dt>trace</dt><dd>a problem, the teacher's reasoning and its answer: the material that a student
learns from</dd>
<dt>gain kept</dt><dd>improvement over the untrained student, as a share of the improvement from
training on whole traces. 100 % is as good as whole traces; less than 0 % is worse than no
training</dd>
<dt>enough?</dt><dd>whether it keeps at least {enough} of the gain. Every run is compared with the
run on whole traces of the same seed, prompt by prompt, and the test is stricter the more groups are
compared (Holm). Where it cannot be told, the table says how many prompts, or seeds, would</dd>
<dt>93 % (90 % to 96 %)</dt><dd>the figure, and the interval that holds the true one 95 times in
100, over other prompts and other seeds; with one run it covers the prompts alone</dd>
<dt>computation</dt><dd>floating-point operations of training, whole traces being 100 %</dd>
</dl>"""


def write_report(
    out: Path, header: Mapping[str, Any], costs: Costs, *, num_unfinished: int = 0
) -> str:
    """Write the report of every finished cell of a sweep's folder; return the answer.

    Args:
        out: The sweep's folder.
        header: Provenance of the cache.
        costs: From the options of a cell's run to `span_costs`.
        num_unfinished: Number of cells still to come; the page says so and reloads itself.

    Raises:
        ValueError: If its cells do not belong together.
    """
    cells = read_cells(out, costs)
    groups = group_cells(cells)
    _write_csv(out / "results.csv", cells)
    draw(groups, out / "report.png")
    sentence = conclusion(groups)
    page = _page(out, cells, groups, sentence, header, num_unfinished)
    publish(out / "report.html", page.encode())
    return sentence


def _write_csv(file: Path, cells: Sequence[CellResult]) -> None:
    rows = csv_rows(cells)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    publish(file, content.getvalue().encode())


def _page(
    out: Path,
    cells: Sequence[CellResult],
    groups: Sequence[Group],
    sentence: str,
    header: Mapping[str, Any],
    num_unfinished: int,
) -> str:
    facts = sweep_record(out)
    student = escape(Path(facts["student"]).name)
    refresh = f'<meta http-equiv="refresh" content="{_REFRESH_S}">' if num_unfinished else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>How much of each trace does {student} need?</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>How much of each trace does {student} need?</h1>
{_running(cells, num_unfinished)}
<p class="answer">{escape(sentence)}</p>
{_failures(out)}
{_seeds_alone(cells)}
{tables.overview(groups, decide(groups))}
<div class="panels">{_pictures(groups)}</div>
<h2>What the words mean</h2>
{_WORDS.format(enough=whole_percent(ENOUGH))}
<details><summary>How the answers are</summary>
{tables.answers(groups)}</details>
<details><summary>By kind of problem</summary>
{tables.by_problem_group(groups)}</details>
<details><summary>What training cost</summary>
{tables.costs(groups)}
<p>FLOP = {escape(FORMULA)}. Memory is the process' growth on a CPU, the allocator's peak on a GPU;
both include weights and optimizer. The cache of that size holds just the bands read. Saved tokens
come after the last one needed: a teacher that stopped there would not generate them.
{_captured(groups)} Break-even: number of runs after which a teacher kept in memory would have
processed more tokens than that.</p>
{tables.flops(out / "flops.json")}</details>
<details><summary>Distance from the teacher on held-out traces</summary>
{tables.heldout(groups)}
<p>KL is how far the student's distribution is from the teacher's, NLL how surprised it is by the
tokens; smaller is better for both.</p></details>
<details><summary>Configuration and commands</summary>
{_provenance(facts, header, cells)}</details>
</body></html>
"""


def _running(cells: Sequence[CellResult], num_unfinished: int) -> str:
    if not num_unfinished:
        return ""
    at = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<p class="running">{len(cells)} cells are finished, {num_unfinished} are still to come. '
        f"Written {at}, and again after every cell.</p>"
    )


def _failures(out: Path) -> str:
    return "".join(
        f'<p class="failed">Cell {escape(file.parent.name)} failed: '
        f"{escape(file.read_text(encoding='utf-8').strip())}</p>"
        for file in sorted(out.glob("cells/*/failed.txt"))
    )


def _seeds_alone(cells: Sequence[CellResult]) -> str:
    """Warn where answers cannot be compared prompt by prompt; the seeds then say it all."""
    lacking = sorted(cell.result["cell"] for cell in cells if cell.right_P is None)
    if not lacking:
        return ""
    return (
        f'<p class="running">completions.jsonl is missing in {len(lacking)} of {len(cells)} cells '
        f"(the first is {escape(lacking[0])}), so it is not known which prompts were answered: all "
        "intervals and tests here rest on the seeds alone, and say nothing about other prompts. "
        "Put the files back and run the same sweep again.</p>"
    )


def _pictures(groups: Sequence[Group]) -> str:
    return "".join(
        f'<img alt="{escape(panel.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(panel.png()).decode("ascii")}">'
        for panel in panels(groups)
    )


def _captured(groups: Sequence[Group]) -> str:
    tokens = {group.mean("costs", "num_captured") for group in groups} - {None}
    return "".join(f"The capture ran the teacher once on {n:,.0f} tokens." for n in tokens)


def _provenance(
    facts: Mapping[str, Any], header: Mapping[str, Any], cells: Sequence[CellResult]
) -> str:
    commands = [command for cell in cells for command in cell.result["commands"]]
    calls = [shlex.join(call) for call in facts["calls"]]
    common = {name: value for name, value in facts.items() if name != "calls"}
    return f"""<h2>Configuration</h2>
<pre>{escape(json.dumps(common, indent=1))}</pre>
<h2>Provenance of the cache</h2>
<pre>{escape(json.dumps(dict(header), indent=1))}</pre>
<h2>Commands</h2>
<p>The sweep, and below the runs and evaluations that it started:</p>
<pre>{escape(chr(10).join(calls))}</pre>
<details><summary>{len(commands)} commands</summary>
<pre>{escape(chr(10).join(commands))}</pre></details>"""
