"""Checkpoints: all that the next step depends on, whole or absent, with damage always detected.

checkpoints/step-000000500/state.pt           weights, optimizer and schedule
checkpoints/step-000000500/random-00000.pt    random generators of each process
checkpoints/step-000000500/progress.json      RunState, and the mark of metrics.jsonl
checkpoints/step-000000500/checksums.json     sha256 of each, verified before any is read
checkpoints/damaged-step-000000500/           one that has changed since it was written, set aside
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from student_train.run.folder import MetricsMark, RunFolder
from student_train.run.state import RunState
from teacher_cache.format.checksums import DamagedFileError, check_folder, write_checksums
from teacher_cache.format.files import fsync, publish_folder, remove_folder

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"
_STATE = "state.pt"


def write_checkpoint(
    run: RunFolder,
    state: RunState,
    tensors: Mapping[str, Any],
    accelerator: Accelerator,
    *,
    keep_last: int,
) -> None:
    """Publish a checkpoint and remove old ones; all ranks call it together.

    Args:
        run: Folder of the run.
        state: State of the run.
        tensors: State dicts by name; those of the main process are written.
        accelerator: Accelerator of the run.
        keep_last: Number of newest checkpoints to keep, beside the best one.
    """
    folder = run.checkpoint_of(state.step)
    temporary = folder.with_name(f".tmp-ranks-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    accelerator.wait_for_everyone()
    _save(_random_state(), temporary / _random_file(accelerator.process_index))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        fsync(run.metrics_file)
        progress = {"state": state.to_json(), "metrics": run.metrics_mark.to_json()}
        with publish_folder(folder) as final:
            for file in temporary.iterdir():
                file.rename(final / file.name)
            _save(dict(tensors), final / _STATE)
            (final / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            write_checksums(final)
        temporary.rmdir()
        best = run.checkpoint_of(state.best_step)
        for old in run.checkpoint_folders()[:-keep_last]:
            if old != best:
                remove_folder(old)
    accelerator.wait_for_everyone()


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
    progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    return RunState.from_json(progress["state"]), MetricsMark(**progress["metrics"])


def read_state(folder: Path) -> dict[str, Any]:
    """The state dicts of a checkpoint, on the CPU."""
    # Mapped, not read: every process needs a part of it, and they share the pages.
    state: dict[str, Any] = torch.load(
        folder / _STATE, map_location="cpu", mmap=True, weights_only=True
    )
    return state


def restore_random_state(folder: Path, rank: int) -> None:
    """Restore the random generators; a rank that the run did not have keeps its own."""
    file = folder / _random_file(rank)
    if not file.exists():
        return
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _check(run: RunFolder, folder: Path, *, needs_best: bool) -> None:
    check_folder(folder, "")
    state, mark = read_checkpoint(folder)
    run.check_metrics(mark)
    if needs_best and state.best_step not in (0, state.step):
        check_best(run, state)


def _save(state: Mapping[str, Any], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # PyTorch's word for a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{file}: the checkpoint cannot be written ({reason}); is the disk full? The last "
            "whole one stays: free some space and run the same command again"
        ) from error


def _random_state() -> dict[str, Any]:
    # Dropout is the only user of random numbers here; the order of traces has its own.
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"
