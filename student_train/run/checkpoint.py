"""Checkpoints: everything that the next step depends on, whole or absent."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from student_train.run.folder import RunFolder
from student_train.run.state import RunState
from teacher_cache.format.files import fsync, publish_folder, remove_folder

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
    """Publish a checkpoint and take old ones away; all ranks call it together.

    Args:
        run: Its folder.
        state: Of the run.
        tensors: Name -> state dict; the main process' is written.
        accelerator: Of the run.
        keep_last: How many of the newest stay, beside the best one.
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
        progress = {
            "state": state.to_json(),
            "metrics_bytes": run.metrics_file.stat().st_size,
        }
        with publish_folder(folder) as final:
            for file in temporary.iterdir():
                file.rename(final / file.name)
            _save(dict(tensors), final / _STATE)
            (final / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        temporary.rmdir()
        best = run.checkpoint_of(state.best_step)
        for old in sorted(run.checkpoints.glob("step-*"))[:-keep_last]:
            if old != best:
                remove_folder(old)
    accelerator.wait_for_everyone()


def read_checkpoint(folder: Path) -> tuple[RunState, int]:
    """How far the run was at a checkpoint, and the length of `metrics.jsonl` then."""
    progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    return RunState.from_json(progress["state"]), progress["metrics_bytes"]


def read_state(folder: Path) -> dict[str, Any]:
    """The state dicts of a checkpoint, on the CPU."""
    # Mapped, not read: every process wants some of it, and they share the pages.
    state: dict[str, Any] = torch.load(
        folder / _STATE, map_location="cpu", mmap=True, weights_only=True
    )
    return state


def restore_random_state(folder: Path, rank: int) -> None:
    """Set the random generators as they were; a rank that the run did not have keeps its own."""
    file = folder / _random_file(rank)
    if not file.exists():
        return
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _save(state: Mapping[str, Any], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # PyTorch's word for a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{file}: the checkpoint cannot be written ({reason}); is the disk full? The last "
            "whole one stays: run the same command again when there is room"
        ) from error


def _random_state() -> dict[str, Any]:
    # Dropout is the only user of random numbers here; the order of traces has its own.
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"
