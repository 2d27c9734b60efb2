"""compare.html in a sweep's folder: one run of each group beside the run on whole traces."""

from collections.abc import Sequence
from pathlib import Path

from student_train.compare.page import comparison_page
from student_train.compare.runs import read_run
from student_train.sweep.cell_run import sweep_record
from student_train.sweep.cells import FULL
from student_train.sweep.groups import Group
from student_train.sweep.labels import label
from student_train.sweep.results import CellResult
from teacher_cache.format.files import publish

_NUM_FLIPS = 5  # of each group and kind; `train-student compare` shows more


def write_comparison(out: Path, cells: Sequence[CellResult], groups: Sequence[Group]) -> list[str]:
    """Write the page if there is something to compare.

    Args:
        out: The sweep's folder.
        cells: Its finished cells.
        groups: The same, grouped.

    Returns:
        Names of the runs on it, the one that the others are compared with first; none without it.

    Raises:
        ValueError: If cells were evaluated in different ways.
    """
    labels = {group.name: label(group) for group in groups}
    first_of: dict[str, CellResult] = {}  # the lowest seed of each group
    for cell in sorted(cells, key=lambda cell: (cell.group != FULL, cell.seed or 0)):
        if cell.right_P is not None:
            first_of.setdefault(cell.group, cell)
    if len(first_of) < 2:
        return []
    runs = [
        read_run(out / "cells" / cell.result["cell"], name=labels[group])
        for group, cell in first_of.items()
    ]
    prompts = Path(sweep_record(out)["eval_prompts"])
    page = comparison_page(
        runs, prompts_file=prompts if prompts.is_file() else None, num_flips=_NUM_FLIPS
    )
    publish(out / "compare.html", page)
    return [run.name for run in runs]
