"""Groups of runs that differ only in the seed, and the share of the full-length gain each keeps.

Letters: S seeds, P prompts. Intervals: see `evaluation.intervals`. A group keeps

    kept = (accuracy - untrained) / (full length - untrained)

over the seeds that it shares with the full-length runs. Its interval (Fieller 1954) holds every r
for which the mean of  a_sp - u_p - r (f_sp - u_p)  cannot be told from zero: each prompt and seed
is compared with itself, and the interval agrees exactly with the test of `decisions`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.evaluation.intervals import LEVEL, Mean, share_interval
from student_train.sweep.cells import FULL
from student_train.sweep.results import CellResult

_BASE = "base"
_LARGEST_KEPT = 1e3  # beyond it an interval has no end


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """The cells of one group, by seed."""

    name: str
    cells: tuple[CellResult, ...]
    accuracy: Estimate | None  # None with one run whose completions are not there
    retention: Estimate | None  # accuracy / full-length accuracy, the paper's
    gain_retention: Estimate | None  # of the gain over the untrained student

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of its runs, without the seed."""
        return self.cells[0].result["options"] or {}

    @property
    def kind(self) -> str:
        """`span`, `mixture` or a baseline."""
        return str(self.cells[0].result["kind"])

    @property
    def is_plain_span(self) -> bool:
        """Whether it is a point of the curve: a lead span of every trace, nothing else changed."""
        return self.kind == "span" and list(self.options) == ["lead_span"]

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over its runs."""
        return float(np.mean([cell.accuracy for cell in self.cells]))

    def mean(self, *path: str) -> float | None:
        """Mean over seeds of a figure of result.json; None where a cell lacks it."""
        values = []
        for cell in self.cells:
            value: Any = cell.result
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            values.append(value)
        return None if None in values else sum(values) / len(values)


@dataclass(frozen=True)
class Pairing:
    """The values of the cells of a sweep, to be compared seed by seed and prompt by prompt."""

    cells: Mapping[str, Mapping[int | None, CellResult]]  # by group and seed
    has_prompts: bool  # whether every cell says how it answered each prompt

    @classmethod
    def of(cls, cells: Sequence[CellResult]) -> "Pairing":
        """Sort cells by group and seed."""
        by_group: dict[str, dict[int | None, CellResult]] = {}
        for cell in cells:
            by_group.setdefault(cell.group, {})[cell.seed] = cell
        return cls(by_group, all(cell.right_P is not None for cell in cells))

    def seeds(self, *groups: str) -> list[int | None]:
        """Seeds that all these groups have; the untrained student goes with any."""
        trained = [set(self.cells[name]) for name in groups if name != _BASE]
        common = set.intersection(*trained) if trained else {None}
        return sorted(common, key=lambda seed: (seed is not None, seed))

    def values_SP(self, group: str, seeds: Sequence[int | None]) -> NDArray[np.float64]:
        """[S, P] shares of right answers; [S, 1] where prompts are not told apart."""
        own = self.cells[group]
        cells = [own[None] if group == _BASE else own[seed] for seed in seeds]
        if self.has_prompts:
            return np.stack([cell.right_P for cell in cells if cell.right_P is not None])
        return np.array([[cell.accuracy] for cell in cells])

    def above_untrained_SP(self, group: str, seeds: Sequence[int | None]) -> NDArray[np.float64]:
        """`values_SP` minus the untrained student's; unchanged where there is none."""
        values_SP = self.values_SP(group, seeds)
        if _BASE in self.cells:
            return values_SP - self.values_SP(_BASE, seeds)
        return values_SP


def group_cells(cells: Sequence[CellResult]) -> list[Group]:
    """Groups with accuracies and, where there is a full-length one, retentions.

    There is no retention where its denominator cannot be told from zero.
    """
    pairing = Pairing.of(cells)
    groups = [_group(name, pairing) for name in pairing.cells]
    return sorted(groups, key=_place)


def _group(name: str, pairing: Pairing) -> Group:
    own = pairing.cells[name]
    accuracy = retention = gain = None
    values_SP = pairing.values_SP(name, pairing.seeds(name))
    if values_SP.size > 1:
        accuracy = Estimate(float(values_SP.mean()), *share_interval(values_SP))
    seeds = pairing.seeds(name, FULL) if FULL in pairing.cells else []
    if seeds:
        full_SP = pairing.values_SP(FULL, seeds)
        retention = ratio(pairing.values_SP(name, seeds), full_SP)
        if _BASE in pairing.cells and name != _BASE:
            gain = ratio(
                pairing.above_untrained_SP(name, seeds), pairing.above_untrained_SP(FULL, seeds)
            )
    ordered = sorted(own.values(), key=lambda cell: cell.seed or 0)
    return Group(name, tuple(ordered), accuracy, retention, gain)


def ratio(part_SP: NDArray[np.float64], whole_SP: NDArray[np.float64]) -> Estimate | None:
    """Mean of a part over mean of the whole; None where the whole cannot be told from zero."""
    whole = Mean.of(whole_SP)
    if whole_SP.size < 2 or whole.interval[0] <= 0:
        return None
    value = float(part_SP.mean()) / whole.value

    def is_excluded(kept: float) -> bool:
        return Mean.of(part_SP - kept * whole_SP).p_value < 1 - LEVEL

    return Estimate(value, _bound(value, -1.0, is_excluded), _bound(value, 1.0, is_excluded))


def _bound(value: float, direction: float, is_excluded: Callable[[float], bool]) -> float:
    """Bound at which, moving away from a value, the excluded ones begin."""
    inside, step = 0.0, 0.01
    while not is_excluded(value + direction * step):
        inside, step = step, 2 * step
        if step > _LARGEST_KEPT:
            return direction * float("inf")
    for _ in range(20):
        middle = (inside + step) / 2
        if is_excluded(value + direction * middle):
            step = middle
        else:
            inside = middle
    return value + direction * inside


def _place(group: Group) -> tuple[int, float, str]:
    """Sort key: the untrained student, the curve, mixtures, other spans, baselines."""
    options = group.options
    if group.kind == _BASE:
        return 0, 0.0, group.name
    if group.is_plain_span:
        return 1, float(options["lead_span"]), group.name
    if group.kind == "mixture":
        return 2, 0.0, group.name
    return (3 if group.kind == "span" else 4), 0.0, group.name
