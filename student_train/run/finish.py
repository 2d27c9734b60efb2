"""From the last step to the student in the run's folder."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_train.errors import NonFiniteLossError
from student_train.model.adapters import with_trained_adapters
from student_train.model.load import load_model, stored_dtype
from student_train.model.save import make_savable, save_student
from student_train.run.checkpoint import check_best, restore_student
from student_train.run.config import TrainConfig
from student_train.run.inputs import RunInputs
from student_train.run.model_card import model_card
from student_train.run.processes import decided_by_main
from student_train.run.rollouts import taught_by
from student_train.run.setup import Run
from student_train.run.tensors import gathered_weights
from student_train.run.written_first import written_first

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run."""

    model: Path  # Hugging Face folder
    num_steps: int
    metrics: dict[str, Any]  # of the last step
    was_finished: bool  # before this call


def finished_before(inputs: RunInputs) -> TrainResult:
    """The result of a run whose student an earlier call has written.

    Raises:
        DamagedFileError: If the student, or the record of the result, is damaged.
    """
    metrics = decided_by_main(inputs.accelerator, inputs.folder.read_result)
    return TrainResult(inputs.folder.model, metrics["step"], metrics, was_finished=True)


def finish(run: Run) -> TrainResult:
    """Choose the student, check its weights and write it; every process calls it.

    Raises:
        DamagedFileError: If the best step's checkpoint or `metrics.jsonl` is damaged.
        NonFiniteLossError: If the last step left weights that are not finite numbers.
        OSError: If the student cannot be written.
    """
    inputs, folder = run.inputs, run.inputs.folder
    metrics = decided_by_main(inputs.accelerator, folder.metrics.last)
    chosen = _choose_student(run, metrics)
    weights = gathered_weights(inputs.model)  # of adapters, where only they were trained
    with inputs.files.shared():
        if inputs.accelerator.is_main_process:
            _check_weights(weights)
            _log_counts(run)
            folder.write_result(metrics)
            with written_first():
                _write_student(run, weights, chosen)
    return TrainResult(folder.model, run.state.step, metrics, was_finished=False)


def _choose_student(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """Restore the best step's weights if asked to; return the metrics of the chosen step."""
    folder, state, accelerator = run.inputs.folder, run.state, run.inputs.accelerator
    if run.inputs.config.select != "heldout" or state.best_step == state.step:
        return metrics
    decided_by_main(accelerator, lambda: check_best(folder, state))
    best = folder.checkpoint_of(state.best_step)
    restore_student(best, run.inputs.model, run.inputs.files)
    if accelerator.is_main_process:
        logger.info(
            "the student after step %d is taken, with a held-out KL of %.4f",
            state.best_step,
            state.best_kl,
        )
    return decided_by_main(accelerator, lambda: folder.metrics.of_step(state.best_step))


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse to write a student that the last step broke: no later loss would show it.

    Raises:
        NonFiniteLossError: If a weight is not a finite number; it names the first.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise NonFiniteLossError(
                f"the last step left {name} without finite numbers, so no student is written. "
                "Lower --lr and start over in another --out."
            )


_TAUGHT_BY = {
    "tokens": "distribution",
    "chunks": "chunk of known likelihood",
    "samples": "distribution",
}


def _log_counts(run: Run) -> None:
    state = run.state
    if state.num_absent:
        logger.warning(
            "%s kept entries had ids that the student lacks; their mass was in the tail",
            f"{state.num_absent:,}",
        )
    if state.num_hard_labels:
        logger.info(
            "%s of %s loss tokens had no %s: the hard label alone taught them",
            f"{state.num_hard_labels:,}",
            f"{state.num_tokens:,}",
            _TAUGHT_BY[run.inputs.config.match],
        )
    if state.num_left_out:
        logger.warning(
            "%s tokens without a %s were left out of the loss: --ce-weight is 0, so nothing "
            "teaches them",
            f"{state.num_left_out:,}",
            _TAUGHT_BY[run.inputs.config.match],
        )
    if state.num_empty_traces:
        logger.warning(
            "%s times a trace had no loss token and taught nothing; %d of %d steps had only "
            "such traces and changed nothing",
            f"{state.num_empty_traces:,}",
            state.num_empty_steps,
            state.step,
        )


def _save_dtype(config: TrainConfig) -> torch.dtype:
    if config.save_dtype is None:
        return stored_dtype(config.student, revision=config.student_revision) or torch.float32
    dtype: torch.dtype = getattr(torch, config.save_dtype)
    return dtype


def _write_student(run: Run, weights: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
    """Publish the model folder under its name; adapters are merged first, if asked for."""
    inputs, config = run.inputs, run.inputs.config
    model: Any = inputs.model
    if config.lora is not None:
        model, _ = load_model(config.student, revision=config.student_revision, dtype=torch.float32)
        make_savable(config.student, model)
        is_merged = config.lora_output == "merged"
        model = with_trained_adapters(model, config.lora, weights, merged=is_merged)
        weights = model.state_dict()
    save_student(
        model,
        inputs.tokenizer,
        inputs.folder.model,
        weights=weights,
        dtype=_save_dtype(config),
        terminal_token_ids=inputs.data.terminal_token_ids
        if config.chat_template == "cache"
        else (),
        card=model_card(config, inputs.data, metrics, run.state.step),
        teachers=taught_by(config, inputs.data),
    )
