"""Global batches made ready for a device in the thread that reads ahead."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from student_train.batch.micro_batch import MicroBatch
from student_train.data.stream import Cursor, StreamStep
from student_train.data.tokens import SelectedTrace


@dataclass(frozen=True)
class PreparedStep:
    """One rank's part of a global batch, cut into micro-batches; fields as in `StreamStep`."""

    cursor: Cursor
    batches: list[MicroBatch]  # pinned where the device is a GPU
    trace_ids: tuple[str, ...]
    bytes_read: int


def prepared(
    step: StreamStep,
    collate: Callable[[list[SelectedTrace], int], list[MicroBatch]],
    device: torch.device,
) -> PreparedStep:
    """Do everything with a step that can be done before the device gets to it.

    Args:
        step: Step as it was read.
        collate: Function that makes micro-batches of its traces, given their epoch.
        device: Device of the student.
    """
    batches = collate(step.traces, step.epoch)
    if device.type == "cuda":
        with torch.cuda.device(device):  # a thread's own is the first GPU: not of every process
            batches = [batch.pinned() for batch in batches]
    return PreparedStep(step.cursor, batches, step.trace_ids, step.bytes_read)
