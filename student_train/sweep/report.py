"""The report of a sweep: results.csv and report.html, one self-contained page."""

import csv
import io
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_train.model.flops import FORMULA
from student_train.sweep import tables
from student_train.sweep.cell_run import sweep_record
from student_train.sweep.charts import interval_charts, point_charts
from student_train.sweep.comparison import write_comparison
from student_train.sweep.conclusion import conclusion
from student_train.sweep.decisions import ENOUGH, decide
from student_train.sweep.groups import Group, group_cells
from student_train.sweep.labels import whole_percent
from student_train.sweep.results import CellResult, Costs, csv_rows, read_cells
from teacher_cache.format.files import publish
from teacher_cache.pages.page import render

_TEMPLATE = Path(__file__).with_name("report.html")
_REFRESH_S = 60


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
    sentence = conclusion(groups)
    page = _page(out, cells, groups, sentence, header, num_unfinished)
    publish(out / "report.html", page)
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
) -> bytes:
    facts = sweep_record(out)
    failures = [
        (file.parent.name, file.read_text(encoding="utf-8").strip())
        for file in sorted(out.glob("cells/*/failed.txt"))
    ]
    return render(
        _TEMPLATE,
        title=f"How much of each trace does {Path(facts['student']).name} need?",
        refresh_s=_REFRESH_S,
        num_finished=len(cells),
        num_unfinished=num_unfinished,
        written=time.strftime("%Y-%m-%d %H:%M"),
        sentence=sentence,
        failures=failures,
        # Their answers cannot be compared prompt by prompt; the seeds then say it all.
        lacking=sorted(cell.result["cell"] for cell in cells if cell.right_P is None),
        compared=write_comparison(out, cells, groups),
        point_charts=point_charts(groups),
        interval_charts=interval_charts(groups),
        enough=whole_percent(ENOUGH),
        overview=tables.overview(groups, decide(groups)),
        answers=tables.answers(groups),
        by_problem_group=tables.by_problem_group(groups),
        costs=tables.costs(groups),
        formula=FORMULA,
        captured={group.mean("costs", "num_captured") for group in groups} - {None},
        flops=tables.flops(out / "flops.json"),
        heldout=tables.heldout(groups),
        configuration=json.dumps({k: v for k, v in facts.items() if k != "calls"}, indent=1),
        provenance=json.dumps(dict(header), indent=1),
        calls=[shlex.join(call) for call in facts["calls"]],
        commands=[command for cell in cells for command in cell.result["commands"]],
    )
