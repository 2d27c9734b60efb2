"""Writing of checkpoints, in the background where weights and optimizer are split."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from student_train.run.checkpoint import (
    PROGRESS_NAME,
    STATE_NAME,
    TENSORS_NAME,
    random_name,
    random_state,
)
from student_train.run.file_work import FileWork
from student_train.run.folder import RunFolder
from student_train.run.state import RunState
from student_train.run.tensors import gathered_state, is_split, split_state_writer
from student_train.run.written_first import written_first
from teacher_cache.format.checksums import write_checksums
from teacher_cache.format.files import fsync, publish_folder, remove_folder

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; a context manager that ends with the last one.

    Whole weights are gathered and written while all processes wait. Split ones are copied into
    the memory of their hosts, and every process writes its part while training goes on; but not
    where they are in that memory already, which might not hold them twice.
    """

    def __init__(
        self, run: RunFolder, files: FileWork, *, keep_last: int, in_background: bool = True
    ) -> None:
        """Prepare to write.

        Args:
            run: Folder of the run.
            files: Meeting point of the processes.
            keep_last: Number of newest checkpoints to keep, beside the best one.
            in_background: Whether split weights are copied, and written while training goes on.
        """
        self._in_background = in_background
        self._run, self._files, self._keep_last = run, files, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(
        self,
        state: RunState,
        model: PreTrainedModel,
        optimizer: Optimizer,
        scheduler: LRScheduler,
    ) -> None:
        """Write a checkpoint and remove old ones; all processes call it together.

        Split weights and optimizer are written after it has returned: until `wait`, the checkpoint
        may be absent.

        Raises:
            ConnectionError: If another process is gone.
            OSError: If this one, or the one before, cannot be written.
        """
        self.wait()
        folder = self._run.checkpoint_of(state.step)
        temporary = folder.with_name(f".tmp-ranks-{folder.name}")
        with self._files.shared():
            if self._files.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                fsync(self._run.metrics.path)
        with self._files.shared():
            _save(random_state(), temporary / random_name(self._files.rank))
        others: dict[str, Any] = {"scheduler": scheduler.state_dict()}
        save_split: Callable[[], None] | None = None
        if is_split(model):
            save_split = split_state_writer(
                temporary / TENSORS_NAME, model, optimizer, self._files, copy=self._in_background
            )
        else:
            others |= gathered_state(model, optimizer)
        progress = {}
        if self._files.is_main:
            progress = {"state": state.to_json(), "metrics": self._run.metrics.mark.to_json()}
        best = self._run.checkpoint_of(state.best_step)

        def complete() -> None:
            if save_split is not None:
                save_split()
            if self._files.is_main:
                with written_first():
                    self._publish(temporary, folder, progress, others)
                self._remove_old(best)

        if save_split is not None and self._in_background:
            self._pending = self._thread.submit(complete)
            return
        with self._files.shared():
            complete()

    def wait(self) -> None:
        """Wait until the last checkpoint is in its place; all processes call it together.

        Raises:
            ConnectionError: If another process is gone.
            OSError: In every process, if the checkpoint cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._files.shared():
                pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            elif self._pending is not None and (failure := self._pending.exception()):
                # The run ends with `error` in any case, maybe in this process alone.
                logger.warning("the checkpoint before is not complete: %s", failure)
        finally:
            self._thread.shutdown()

    def _publish(
        self,
        temporary: Path,
        folder: Path,
        progress: Mapping[str, Any],
        others: Mapping[str, Any],
    ) -> None:
        with publish_folder(folder) as final:
            # By name: a list of the folder may be older than what other machines wrote to it.
            names = [random_name(rank) for rank in range(self._files.num_processes)]
            if (temporary / TENSORS_NAME).is_dir():
                names.append(TENSORS_NAME)
            for name in names:
                (temporary / name).rename(final / name)
            _save(others, final / STATE_NAME)
            (final / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
            write_checksums(final)
        temporary.rmdir()

    def _remove_old(self, best: Path) -> None:
        for old in self._run.checkpoint_folders()[: -self._keep_last]:
            if old != best:
                remove_folder(old)


def _save(state: Mapping[str, Any], file: Path) -> None:
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:  # PyTorch's word for a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{file}: the checkpoint cannot be written ({reason}); is the disk full? The last "
            "whole one stays: free some space and run the same command again"
        ) from error
