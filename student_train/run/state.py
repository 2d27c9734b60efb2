"""Progress of a run: the counts of its loop, which every checkpoint holds."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from student_train.data.stream import Cursor

_NEW_LOSS_SHARE = 0.05
_LARGEST_GROWTH = 10.0
_NUM_FIRST_LOSSES = 10  # a mean of fewer may be low by chance: it has to be exceeded by more
_SMALL_LOSS = 0.01  # nats; below it, steps differ by any factor


@dataclass
class RunState:
    """Counts over all steps and all processes so far; the same in every process."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    bytes_read: int = 0  # from shards
    num_empty_steps: int = 0  # steps without a loss token
    num_empty_traces: int = 0  # times that a trace had none
    num_absent: int = 0  # kept entries trained on whose id the student lacks
    num_hard_labels: int = 0  # loss tokens that their label alone taught
    num_left_out: int = 0  # selected tokens that nothing taught
    num_tokens: int = 0  # loss tokens
    flops: int = 0  # by FlopFormula
    train_s: float = 0.0  # in the loop
    best_step: int = 0  # 0: not evaluated yet
    best_kl: float = math.inf  # on held-out traces, after that step
    num_worse: int = 0  # measurements on held-out traces since then
    num_losses: int = 0  # noted so far
    # Geometric, or one bad step would weigh as much as ten: of all so far, then over about
    # 1 / _NEW_LOSS_SHARE steps. Steps that differ by a standard deviation of ln(loss) of 1.25 give
    # some 2 false alarms in 100,000 runs of 400 steps.
    mean_loss: float = math.nan
    lowest_mean_loss: float = math.inf  # of fewer than `_NUM_FIRST_LOSSES`, with an allowance

    def advance(
        self,
        cursor: Cursor,
        *,
        num_valid: int,
        num_absent: int,
        num_hard_labels: int,
        num_left_out: int,
        num_empty_traces: int,
    ) -> None:
        """Begin the next step, with the counts of its global batch."""
        self.step += 1
        self.cursor = cursor
        self.num_tokens += num_valid
        self.num_absent += num_absent
        self.num_hard_labels += num_hard_labels
        self.num_left_out += num_left_out
        self.num_empty_traces += num_empty_traces
        self.num_empty_steps += num_valid == 0

    def note_heldout(self, kl: float) -> None:
        """Remember this step if no step before it had so low a held-out KL."""
        self.num_worse += 1
        if kl < self.best_kl:
            self.best_step, self.best_kl, self.num_worse = self.step, kl, 0

    def is_over(self, num_steps: int, patience: int | None) -> bool:
        """Whether no step follows: after the last one, or when patience has ended."""
        return self.step >= num_steps or (patience is not None and self.num_worse >= patience)

    def note_loss(self, loss: float) -> None:
        """Add a step's loss to the moving average."""
        self.num_losses += 1
        loss = max(loss, _SMALL_LOSS)
        if self.num_losses == 1:
            self.mean_loss = loss
        self.mean_loss *= (loss / self.mean_loss) ** max(_NEW_LOSS_SHARE, 1 / self.num_losses)
        allowance = max(1.0, _NUM_FIRST_LOSSES / self.num_losses) ** 1.5
        self.lowest_mean_loss = min(self.lowest_mean_loss, allowance * self.mean_loss)

    @property
    def has_diverged(self) -> bool:
        """Whether the loss is ten times as high as it was, over some steps and not in one."""
        is_several_steps = self.num_losses >= _NUM_FIRST_LOSSES
        return is_several_steps and self.mean_loss > _LARGEST_GROWTH * self.lowest_mean_loss

    def to_json(self) -> dict[str, Any]:
        """Every count as a JSON value."""
        return {**asdict(self), "cursor": self.cursor.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        """Read what `to_json` wrote."""
        return cls(**{**values, "cursor": Cursor.from_json(values["cursor"])})
