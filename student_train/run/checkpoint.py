"""Checkpoints: all that the next step depends on, whole or absent, with damage always detected.

checkpoints/step-000000500/state.pt           weights, optimizer and schedule
checkpoints/step-000000500/tensors/           weights and optimizer instead, where they were split
checkpoints/step-000000500/random-00000.pt    random generators of each process
checkpoints/step-000000500/progress.json      RunState, and the mark of metrics.jsonl
checkpoints/step-000000500/checksums.json     sha256 of each, verified before any is read
checkpoints/damaged-step-000000500/           one that has changed since it was written, set aside

`checkpoint_writer` writes them. Either kind is read by any number of processes, split or not.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from student_train.run.file_work import FileWork
from student_train.run.folder import RunFolder
from student_train.run.metrics_file import MetricsMark
from student_train.run.state import RunState
from student_train.run.tensors import (
    read_split_state,
    read_split_weights,
    restore_state,
    restore_weights,
)
from teacher_cache.format.checksums import DamagedFileError, check_folder

logger = logging.getLogger(__name__)

PROGRESS_NAME = "progress.json"
STATE_NAME = "state.pt"
TENSORS_NAME = "tensors"  # a folder of torch.distributed.checkpoint


def whole_checkpoint(run: RunFolder, *, needs_best: bool) -> Path | None:
    """Find the newest undamaged checkpoint; newer, damaged ones are set aside.

    Only the main process calls it.

    Args:
        run: Folder of the run.
        needs_best: Whether the run may end with the student of the best step, so that its
            checkpoint has to be whole too.

    Raises:
        DamagedFileError: If there are checkpoints, and none is whole.
    """
    found: list[tuple[Path, DamagedFileError]] = []
    for folder in reversed(run.checkpoint_folders()):
        try:
            _check(run, folder, needs_best=needs_best)
        except DamagedFileError as error:
            found.append((folder, error))
            continue
        for damaged, damage in found:
            aside = run.put_aside(damaged)
            logger.warning(
                "%s The run is resumed from %s; %s is put aside as %s",
                damage, folder.name, damaged.name, aside.name,
            )  # fmt: skip
        return folder
    if found:
        raise DamagedFileError(
            f"{found[0][1]} No other checkpoint is whole: restore the file from a copy, or remove "
            f"{run.checkpoints} to begin the run anew."
        )
    return None


def check_best(run: RunFolder, state: RunState) -> None:
    """Make sure that the checkpoint of the best step is undamaged.

    Raises:
        DamagedFileError: If it is damaged; it names the file.
    """
    check_folder(
        run.checkpoint_of(state.best_step), "The best student of this run is lost with it."
    )


def read_checkpoint(folder: Path) -> tuple[RunState, MetricsMark]:
    """State of the run at a checkpoint, and the mark of `metrics.jsonl`."""
    progress = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
    return RunState.from_json(progress["state"]), MetricsMark(**progress["metrics"])


def restore(
    folder: Path,
    model: PreTrainedModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    files: FileWork,
) -> None:
    """Restore weights, optimizer and schedule; all processes call it together.

    Args:
        folder: A checkpoint.
        model: Student in its place, changed in place like the other two.
        optimizer: Optimizer over its parameters.
        scheduler: Schedule of that optimizer.
        files: Meeting point of the processes.
    """
    state = _read_state(folder)
    if (folder / TENSORS_NAME).is_dir():
        read_split_state(folder / TENSORS_NAME, model, optimizer, files)
    else:
        restore_state(model, optimizer, state)
    scheduler.load_state_dict(state["scheduler"])


def restore_student(folder: Path, model: PreTrainedModel, files: FileWork) -> None:
    """Restore the weights alone; see `restore`."""
    if (folder / TENSORS_NAME).is_dir():
        read_split_weights(folder / TENSORS_NAME, model, files)
    else:
        restore_weights(model, _read_state(folder)["student"])


def restore_random_state(folder: Path, rank: int, *, seed: int) -> None:
    """Restore the random generators.

    A rank that the run did not have begins with others than in any step before, by the run's seed.
    """
    file = folder / random_name(rank)
    if not file.exists():
        place = int(folder.name.rpartition("-")[2]), rank
        torch.manual_seed(int(np.random.SeedSequence((seed, *place)).generate_state(1)[0]))
        return
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def random_state() -> dict[str, Any]:
    """The random generators of this process."""
    # Dropout is the only user of random numbers here; the order of traces has its own.
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def random_name(rank: int) -> str:
    """File of a process' random generators."""
    return f"random-{rank:05d}.pt"


def _read_state(folder: Path) -> dict[str, Any]:
    # Mapped, not read: every process needs a part of it, and they share the pages.
    state: dict[str, Any] = torch.load(
        folder / STATE_NAME, map_location="cpu", mmap=True, weights_only=True
    )
    return state


def _check(run: RunFolder, folder: Path, *, needs_best: bool) -> None:
    check_folder(folder, "")
    state, mark = read_checkpoint(folder)
    run.metrics.check(mark)
    if needs_best and state.best_step not in (0, state.step):
        check_best(run, state)
