"""How far a training is: a bar on a terminal, a line now and then elsewhere."""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 10.0


class TrainingProgress:
    """Shows the metrics of a run's steps on stderr; use it inside a `with` block."""

    def __init__(self, num_steps: int, first_step: int, *, enabled: bool) -> None:
        self._num_steps = num_steps
        self._first_step = first_step
        self._enabled = enabled
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=num_steps, completed=first_step)

    def __enter__(self) -> Self:
        self._started_s = self._shown_s = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics, if it is time."""
        if not self._enabled:
            return
        step = metrics["step"]
        if self._bar:
            self._bar.update(self._task, completed=step, description=describe(metrics))
            return
        now_s = time.monotonic()
        if now_s - self._shown_s >= LINE_INTERVAL_S or step == self._num_steps:
            self._shown_s = now_s
            per_step_s = (now_s - self._started_s) / (step - self._first_step)
            eta_min = per_step_s * (self._num_steps - step) / 60
            line = f"step {step:,}/{self._num_steps:,} | {describe(metrics)}"
            logger.info("%s | eta %.0f min", line, eta_min)


def describe(metrics: Mapping[str, Any]) -> str:
    """The figures of a step in one line."""
    heldout = f" | held-out kl {metrics['heldout_kl']:.4f}" if "heldout_kl" in metrics else ""
    return (
        f"loss {metrics['loss']:.4f} | kl {metrics['kl']:.4f} | ce {metrics['ce']:.4f} | "
        f"mass {metrics['student_mass']:.3f} of {metrics['teacher_mass']:.3f} | "
        f"top-1 {metrics['top1_agreement']:.1%} | lr {metrics['lr']:.1e} | "
        f"{metrics['tokens_per_s']:,.0f} tok/s | data {metrics['data_wait_share']:.0%} | "
        f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB{heldout}"
    )
