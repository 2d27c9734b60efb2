"""Does a part of every trace keep enough of the gain? Yes, no, or not decided yet.

For every candidate the mean of

    a_sp - u_p - ENOUGH (f_sp - u_p)

(its accuracy, the untrained student's and the full-length one's, by seed s and prompt p) is tested
against zero, two-sided, paired by seed and prompt; p-values are adjusted for several candidates
(Holm 1979). Where it cannot be told, the numbers of prompts or seeds are given that would detect a
difference as large as the one seen in four of five such sweeps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from student_train.evaluation.intervals import LEVEL, Mean
from student_train.sweep.cells import FULL
from student_train.sweep.groups import Group, Pairing

ENOUGH = 0.9  # of the gain over the untrained student
_POWER = 0.8
_FEWEST_SEEDS = 3
_MOST_PROMPTS = 1_000_000
_MOST_SEEDS = 1_000


class Answer(StrEnum):
    """Whether a group keeps enough."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Decision:
    """Decision on one group, with its evidence."""

    answer: Answer
    p_value: float  # adjusted for the number of groups compared
    num_seeds: int
    num_prompts: int | None  # None where completions are missing
    prompts_needed: int | None = None  # with as many seeds; None where none would be enough
    seeds_needed: int | None = None  # with as many prompts; likewise


def candidates(groups: Sequence[Group]) -> list[Group]:
    """Groups that save computation: shorter traces, mixtures, and thrift on whole traces."""
    return [
        group
        for group in groups
        if group.name != FULL
        and (
            group.is_plain_span
            or group.kind in ("mixture", "half-steps", "half-traces")
            or list(group.options) == ["trace_tokens"]
        )
    ]


def decide(groups: Sequence[Group]) -> dict[str, Decision]:
    """The decision on every candidate; empty without full-length runs or a gain to keep."""
    cells = [cell for group in groups for cell in group.cells]
    pairing = Pairing.of(cells)
    found: dict[str, Mean] = {}
    for group in candidates(groups):
        seeds = pairing.seeds(group.name, FULL) if FULL in pairing.cells else []
        if not seeds or (group.gain_retention or group.retention) is None:
            continue
        full_SP = pairing.above_untrained_SP(FULL, seeds)
        if group.gain_retention is None:  # nothing is gained: of the accuracy itself
            full_SP = pairing.values_SP(FULL, seeds)
            own_SP = pairing.values_SP(group.name, seeds)
        else:
            own_SP = pairing.above_untrained_SP(group.name, seeds)
        found[group.name] = Mean.of(own_SP - ENOUGH * full_SP)
    adjusted = holm({name: mean.p_value for name, mean in found.items()})
    return {
        name: _decision(mean, adjusted[name], len(found), pairing.has_prompts)
        for name, mean in found.items()
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted so that one wrong rejection among all is as rare as promised for one."""
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for place, (name, value) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * value))
        adjusted[name] = largest
    return adjusted


def _decision(mean: Mean, p_value: float, num_tests: int, has_prompts: bool) -> Decision:
    num_prompts = mean.num_prompts if has_prompts else None
    if mean.num_seeds == 1:  # nothing is known of how much another run would differ
        return Decision(Answer.UNKNOWN, p_value, 1, num_prompts, None, _FEWEST_SEEDS)
    if p_value < 1 - LEVEL:
        answer = Answer.YES if mean.value > 0 else Answer.NO
        return Decision(answer, p_value, mean.num_seeds, num_prompts)
    prompts = prompts_needed(mean, num_tests) if has_prompts else None
    seeds = seeds_needed(mean, num_tests)
    return Decision(Answer.UNKNOWN, p_value, mean.num_seeds, num_prompts, prompts, seeds)


def prompts_needed(mean: Mean, num_tests: int) -> int | None:
    """Prompts that would tell this mean from zero, with as many seeds."""
    left = _variance_wanted(mean, num_tests) - mean.seed_variance / mean.num_seeds
    by_prompt = mean.prompt_variance + mean.rest_variance / mean.num_seeds
    return _rounded_up(by_prompt, left, mean.num_prompts, _MOST_PROMPTS)


def seeds_needed(mean: Mean, num_tests: int) -> int | None:
    """Seeds that would tell this mean from zero, with as many prompts."""
    left = _variance_wanted(mean, num_tests) - mean.prompt_variance / mean.num_prompts
    by_seed = mean.seed_variance + mean.rest_variance / mean.num_prompts
    return _rounded_up(by_seed, left, mean.num_seeds, _MOST_SEEDS)


def _variance_wanted(mean: Mean, num_tests: int) -> float:
    """Variance at which the mean, tested first, is told from zero with the wanted power."""
    normal = NormalDist()
    reach = normal.inv_cdf(1 - (1 - LEVEL) / (2 * num_tests)) + normal.inv_cdf(_POWER)
    return (mean.value / reach) ** 2


def _rounded_up(variance: float, wanted: float, now: int, most: int) -> int | None:
    """Variance / wanted to two digits, more than there are now; None above `most`."""
    if wanted <= 0 or variance / wanted > most:
        return None
    number = max(now + 1, math.ceil(variance / wanted))
    unit = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // unit) * unit
