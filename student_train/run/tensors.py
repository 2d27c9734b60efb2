"""Weights and optimizer state as state dicts: whole in the main process, or split as in the run.

Either kind is restored into any number of processes, whether they split the student or not.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from student_train.run.file_work import FileWork, is_of_lost_process, lost_process


def gathered_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The whole weights, on the CPU of the main process, {} in others; all call it together.

    Where only adapters are trained, frozen weights are left out.
    """
    weights: dict[str, Any] = get_model_state_dict(model, options=_whole())
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            weights.pop(name, None)  # what is tied to a frozen one
        elif name in weights:  # what is tied is one tensor again
            weights[name] = weights[first_name.setdefault(id(parameter), name)]
    return weights


def gathered_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Weights and optimizer state by parameter name, as `gathered_weights`.

    The main process holds them all in memory while they are written: see `split_state_writer` for
    those that are split.
    """
    return {
        "student": gathered_weights(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_whole()),
    }


def restore_weights(model: PreTrainedModel, weights: dict[str, Any]) -> None:
    """Load the result of `gathered_weights`; every process has it."""
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    options = StateDictOptions(full_state_dict=True, strict=not has_frozen)
    set_model_state_dict(model, weights, options=options)


def restore_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Load the result of `gathered_state`; every process has it."""
    restore_weights(model, state["student"])
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def is_split(model: PreTrainedModel) -> bool:
    """Whether each process holds a part of every weight."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def split_state_writer(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    files: FileWork,
    *,
    copy: bool,
) -> Callable[[], None]:
    """Prepare to write this process' part of weights and optimizer state.

    Args:
        folder: Folder to write, which all processes reach; torch.distributed.checkpoint's.
        model: A split student.
        optimizer: Optimizer over its parameters.
        files: Meeting point of the processes.
        copy: Whether to copy the part into the host's memory first, so that training may go on.

    Returns:
        A function that writes the part, raising ConnectionError or OSError; all processes call it,
        in any thread.
    """
    writer = FileSystemWriter(folder)
    tensors: dict[str, Any] = {
        "student": _split_weights(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if copy:
        tensors = writer.stage(tensors)

    def write() -> None:
        try:
            save(tensors, storage_writer=writer, process_group=files.group)
        except CheckpointException as error:
            rank, (failure, _) = next(iter(error.failures.items()))
            raise OSError(
                f"{folder}: the checkpoint cannot be written (process {rank}: {failure}); is the "
                "disk full? The last whole one stays: free some space and run the same command "
                "again"
            ) from error
        except RuntimeError as error:
            if not is_of_lost_process(error):
                raise
            raise lost_process(error, "a checkpoint was written") from error

    return write


def read_split_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, files: FileWork
) -> None:
    """Load what `split_state_writer` wrote; each process reads what it needs."""
    read_split_weights(folder, model, files)
    tensors = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    _load(tensors, folder, files)
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"])


def read_split_weights(folder: Path, model: PreTrainedModel, files: FileWork) -> None:
    """Load the weights of what `split_state_writer` wrote."""
    tensors = {"student": _split_weights(model)}
    _load(tensors, folder, files)
    options = StateDictOptions(strict=False)  # frozen and tied ones are not there
    set_model_state_dict(model, tensors["student"], options=options)


def _load(tensors: dict[str, Any], folder: Path, files: FileWork) -> None:
    reader = FileSystemReader(folder)
    try:
        with warnings.catch_warnings():  # about one process, which is no mistake
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=reader, process_group=files.group)
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OSError(
            f"{folder}: the checkpoint cannot be read (process {rank}: {failure})"
        ) from error


def _split_weights(model: PreTrainedModel) -> dict[str, Any]:
    """The trained weights, tied ones once."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen or not parameter.requires_grad:
            weights.pop(name, None)
        seen.add(id(parameter))
    return weights


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
