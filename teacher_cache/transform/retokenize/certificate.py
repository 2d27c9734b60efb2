"""Quality of each derived trace: figures that travel with it, for use in `--where`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import TraceInfo
from teacher_cache.transform.retokenize.alignment import Batch, summed
from teacher_cache.transform.retokenize.distribution import Contributions

FIELD = "retokenized"  # among a trace's own fields


@dataclass(frozen=True)
class Certificate:
    """Quality figures of one derived trace.

    Attributes:
        num_tokens: Student tokens in the response.
        coverage: Share of them with a distribution; the others have only the hard label.
        teacher_nats: Negative log-likelihood of the text under the teacher's own probabilities,
            over stretches where all tokens have distributions.
        student_nats: Likewise under the derived ones. It is lower by `shared_nats`.
        shared_nats: Contribution of other teacher tokens that begin with the student's token: the
            student distinguishes them only later.
        chain_rule_error: Rest of the difference, nats per student token: unknown
            mass inside the teacher's tokens.
        tail_mass: Mean mass that is assigned to no token.
    """

    num_tokens: int
    coverage: float
    teacher_nats: float
    student_nats: float
    shared_nats: float
    chain_rule_error: float
    tail_mass: float

    def to_json(self) -> dict[str, Any]:
        """Rounded figures, as a trace's field."""
        return {
            name: value if isinstance(value, int) else float(f"{value:.6g}")
            for name, value in asdict(self).items()
        }


def certify(
    batch: Batch, found: Contributions, own_mass: NDArray[np.float64], num_responses: int
) -> list[Certificate]:
    """A certificate for each response of a batch.

    Stretches between joints of both tokenizers are compared whole; those with a token without a
    distribution are left out.

    Args:
        batch: Aligned responses.
        found: Distributions of the responses.
        own_mass: [M] mass of each token itself.
        num_responses: Number of responses.
    """
    of = batch.student_response
    is_start = np.ones(len(of), bool)
    is_start[1:] = batch.ends_on[:-1] | (of[1:] != of[:-1])
    stretch = np.cumsum(is_start) - 1
    is_whole = np.bincount(stretch, ~found.has_row) == 0
    first = batch.level[is_start]
    last = np.concatenate([batch.last[np.flatnonzero(is_start)[1:] - 1], batch.last[-1:]])
    # A stretch that begins or ends inside a teacher token is no stretch of teacher tokens.
    is_whole &= batch.depth[is_start] == 0
    is_whole &= np.concatenate(
        [batch.ends_on[np.flatnonzero(is_start)[1:] - 1], batch.ends_on[-1:]]
    )
    teacher = np.where(is_whole, batch.log_realised(first, last + 1), 0.0)

    counted = is_whole[stretch]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_own = np.where(counted, np.log(own_mass), 0.0)
        shared = np.where(counted & batch.ends_on, log_own - np.log(found.path), 0.0)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return summed(of, values, num_responses)

    sizes, num_counted = total(np.ones(len(of))), total(counted.astype(float))
    num_rows, tails = total(found.has_row.astype(float)), total(found.tail)
    teacher_sum = summed(of[is_start], teacher, num_responses)
    own_sum, shared_sum = total(log_own), total(shared)
    return [
        Certificate(
            num_tokens=int(sizes[n]),
            coverage=num_rows[n] / sizes[n],
            teacher_nats=-teacher_sum[n],
            student_nats=-own_sum[n],
            shared_nats=shared_sum[n],
            chain_rule_error=(own_sum[n] - shared_sum[n] - teacher_sum[n])
            / max(1.0, num_counted[n]),
            tail_mass=tails[n] / max(1.0, num_rows[n]),
        )
        for n in range(num_responses)
    ]


def overall(infos: Iterable[TraceInfo]) -> dict[str, float] | None:
    """Combine the certificates of a cache's traces; None if there are none."""
    found = [info.fields[FIELD] for info in infos if isinstance(info.fields.get(FIELD), Mapping)]
    if not found:
        return None
    sizes = np.array([one["num_tokens"] for one in found], float)

    def mean(name: str) -> float:
        return float(np.average([one[name] for one in found], weights=sizes))

    errors = np.abs([one["chain_rule_error"] for one in found])
    return {
        "coverage": mean("coverage"),
        "chain_rule_error": float(np.average(errors, weights=sizes)),
        "largest_chain_rule_error": float(errors.max()),
        "teacher_nats_per_token": sum(one["teacher_nats"] for one in found) / float(sizes.sum()),
        "shared_nats_per_token": sum(one["shared_nats"] for one in found) / float(sizes.sum()),
        "tail_mass": mean("tail_mass"),
    }
