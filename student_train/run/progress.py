"""Progress lines of a run, and its stop by a signal: after the current step."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from student_train.run.state import RunState
from teacher_cache.terminal.stop_signals import StopSwitch, stop_signals

logger = logging.getLogger(__name__)


@contextmanager
def stop_after_step() -> Iterator[StopSwitch]:
    """Note the first SIGINT or SIGTERM: the current step ends, and a checkpoint is written."""
    with stop_signals() as switch, switch.noted(_say_stop):
        yield switch


def _say_stop(signum: int, *, insists: bool) -> None:
    if not insists:
        logger.info("stopping after this step (once more to stop at once)")


def describe(metrics: Mapping[str, Any]) -> str:
    """The figures of a step in one line, the most important first; a terminal cuts the rest."""
    return (
        f"loss {metrics['loss']:.4f} | kl {metrics['kl']:.4f} | ce {metrics['ce']:.4f} | "
        f"top-1 {metrics['top1_agreement']:.1%} | {metrics['tokens_per_s']:,.0f} tok/s | "
        f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB | lr {metrics['lr']:.1e} | "
        f"data {metrics['data_wait_share']:.0%} | "
        f"mass {metrics['student_mass']:.3f} of {metrics['teacher_mass']:.3f}"
    )


def heldout_line(step: int, figures: Mapping[str, float]) -> str:
    """What the held-out traces say, in a line that stays above the progress; 80 columns."""
    of_sections = [
        f"{section} {figures[f'heldout_kl_{section}']:.4f}"
        for section in ("cot", "answer")
        if f"heldout_kl_{section}" in figures
    ]
    by_section = f" ({', '.join(of_sections)})" if of_sections else ""
    return (
        f"step {step:,}: held-out KL {figures['heldout_kl']:.4f}{by_section}, "
        f"top-1 {figures['heldout_top1_agreement']:.1%}"
    )


def patience_line(state: RunState, num_steps: int) -> str:
    """Why a run ends before its last step."""
    return (
        f"ending after step {state.step:,} of {num_steps:,}: {state.num_worse} measurements in "
        f"turn have not lowered the held-out KL of step {state.best_step:,}, {state.best_kl:.4f}"
    )
