"""One training run, from an open cache to a finished student; read it from top to bottom."""

import logging
import math
import os
import signal

from student_train.batch.prepared import PreparedStep
from student_train.errors import DivergedLossError, InterruptedRunError, NonFiniteLossError
from student_train.run.checkpoint_writer import CheckpointWriter
from student_train.run.config import TrainConfig
from student_train.run.file_work import naming_lost_processes
from student_train.run.finish import TrainResult, finish, finished_before
from student_train.run.inputs import open_inputs
from student_train.run.lifeline import joined_run
from student_train.run.memory import advice_when_out_of_memory
from student_train.run.precision import with_precision
from student_train.run.processes import join_processes, owned, require_open_group
from student_train.run.progress import describe, heldout_line, patience_line, stop_after_step
from student_train.run.setup import Run, open_stream, prepare
from student_train.run.sharding import clip_gradients
from student_train.run.step import (
    StepFigures,
    StepTotals,
    add_gradients,
    all_reduced,
    global_counts,
)
from student_train.run.trackers import ending_tracker, log_metrics
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> TrainResult:
    """Train a student on a cache; resume from the checkpoint in the run's folder, if any.

    Args:
        config: Configuration of the run.

    Returns:
        The student's folder, and the last step's metrics.

    Raises:
        CacheError: If the cache cannot be read, or does not fit the student.
        ConnectionError: If another process of the run is gone. Where this one is stuck in waiting
            for it, it is ended with exit code 1 instead, without `finally` blocks.
        ValueError: If the settings do not fit the cache, the student, or the run's folder.
        InUseError: If another process is at work in that folder.
        DivergedLossError: If the loss grows tenfold; the last checkpoint stays.
        NonFiniteLossError: If the loss is no longer a number; the last checkpoint stays.
        InterruptedRunError: After SIGINT or SIGTERM, once a checkpoint has been written.
    """
    require_open_group()
    config = with_precision(config)
    with joined_run(os.environ) as lifeline, naming_lost_processes():
        accelerator = join_processes(config, lifeline)
        with owned(config.out, accelerator):
            with Progress("opening cache and student", enabled=accelerator.is_main_process):
                inputs = open_inputs(config, accelerator)
            if inputs.folder.finished and not inputs.folder.extends(config):
                return finished_before(inputs)
            run = prepare(inputs)
            with ending_tracker(accelerator, config):
                _take_steps(run)
                return finish(run)


def _take_steps(run: Run) -> None:
    """Run the steps from the run's state to its last one.

    Every line runs in every process unless a comment says otherwise; processes wait for each
    other where they count, sum, measure and save.
    """
    # Once.
    inputs, config, state = run.inputs, run.inputs.config, run.state
    accelerator = inputs.accelerator
    bytes_before = state.bytes_read  # by the processes that this run had before
    stream = open_stream(run)
    shown = Progress(
        "training", run.num_steps, "steps", first=state.step, enabled=accelerator.is_main_process
    )
    checkpoints = CheckpointWriter(
        inputs.folder, inputs.files, keep_last=config.keep_last, in_background=not config.offload
    )
    with stop_after_step() as stop, shown, checkpoints, stream, advice_when_out_of_memory(config):
        figures = StepFigures(run, stream)
        for item in stream:
            # Once a step. The normaliser is known everywhere before the first backward.
            counts = global_counts(accelerator, item.batches)
            state.advance(
                item.cursor,
                num_valid=counts.num_valid,
                num_absent=counts.num_absent,
                num_hard_labels=counts.num_hard_labels,
                num_left_out=counts.num_left_out,
                num_empty_traces=len(item.trace_ids) - counts.num_traces,
            )

            # Once a micro-batch, inside; then once a step.
            sums = add_gradients(run, item.batches, counts)
            grad_norm = clip_gradients(run.student.parameters(), config.clip_norm)
            totals = all_reduced(
                run,
                sums,
                flops=sum(run.formula.flops(b.num_positions, b.num_valid) for b in item.batches),
                bytes_read=item.bytes_read,
                signal_number=stop.signum or 0,
            )
            if counts.num_valid and not math.isfinite(totals.sums["loss"] + grad_norm):
                raise NonFiniteLossError(_non_finite(state.step, totals, grad_norm, item))
            lr = float(run.scheduler.get_last_lr()[0])  # torchao has it in a tensor
            run.optimizer.step()  # moves nothing where no token gave a gradient
            run.scheduler.step()
            run.optimizer.zero_grad()
            state.bytes_read = bytes_before + totals.bytes_read
            state.flops += totals.flops
            state.train_s += figures.end_step(counts.num_valid)
            if counts.num_valid:
                # The policy gradient's loss is no level: it may fall below 0.
                level = totals.sums["loss"]
                if config.match == "samples":
                    level = totals.sums["kl"] / max(1, counts.num_distributions)
                state.note_loss(level)
            if state.has_diverged:
                checkpoints.wait()
                raise DivergedLossError(_diverged(run))

            # Every eval_every steps and after the last.
            heldout: dict[str, float] = {}
            is_end = run.is_over
            if run.validation is not None and (is_end or _is_turn(state.step, config.eval_every)):
                heldout = run.validation.measure()
                state.note_heldout(heldout["heldout_kl"])
                if accelerator.is_main_process:
                    logger.info("%s", heldout_line(state.step, heldout))
                is_end = run.is_over  # the last one, if it has not fallen for long enough
                if is_end and state.step < run.num_steps and accelerator.is_main_process:
                    logger.info("%s", patience_line(state, run.num_steps))

            # Every log_every steps, after the last, and where held-out traces were measured.
            if is_end or heldout or _is_turn(state.step, config.log_every):
                line = figures.line(totals, counts, grad_norm=grad_norm, lr=lr) | heldout
                if accelerator.is_main_process:  # the main process alone
                    inputs.folder.metrics.append(line)
                log_metrics(accelerator, config, line, state.step)
                shown.set(state.step, describe(line))
            else:
                shown.set(state.step)

            # Every save_every steps, after the last, when asked to stop, and after a best step.
            is_best = config.select == "heldout" and state.best_step == state.step
            is_turn = _is_turn(state.step, config.save_every)
            is_asked_to_stop = totals.is_asked_to_stop
            if is_end or is_turn or is_best or is_asked_to_stop:
                checkpoints.write(state, inputs.model, run.optimizer, run.scheduler)
                # A signal during the save; several processes agree on it in the next step.
                is_asked_to_stop |= stop.signum is not None and accelerator.num_processes == 1
            if is_end:
                break
            if is_asked_to_stop:
                checkpoints.wait()
                raise InterruptedRunError(
                    f"stopped after step {state.step:,} of {run.num_steps:,}; a checkpoint is in "
                    f"{inputs.folder.checkpoints}. Run the same command again to resume.",
                    stop.signum or signal.SIGTERM,
                )
            figures.begin_step()


def _is_turn(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _diverged(run: Run) -> str:
    state, checkpoints = run.state, run.inputs.folder.checkpoint_folders()
    kept = f" The checkpoint before it stays: {checkpoints[-1]}." if checkpoints else ""
    return (
        f"step {state.step}: the loss is {state.mean_loss:.3g} over the last steps, and was at "
        f"most {state.lowest_mean_loss:.3g} before: the run diverges. Start over in another --out "
        f"with a lower --lr or a longer --warmup.{kept}"
    )


def _non_finite(step: int, totals: StepTotals, grad_norm: float, item: PreparedStep) -> str:
    return (
        f"step {step}: the loss is {totals.sums['loss']} and its gradient's norm {grad_norm}; "
        f"expected finite numbers. Its traces: {', '.join(item.trace_ids)}. Lower --lr, or look "
        "at these traces with cache-teacher inspect."
    )
