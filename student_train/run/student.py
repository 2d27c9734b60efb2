"""The student before training: loaded and checked once, whatever the number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from student_train.model.load import (
    HeadScaling,
    check_student,
    empty_model,
    head_of,
    load_model,
    student_fingerprint,
)
from student_train.model.save import check_saved, make_savable
from student_train.model.tokens import add_missing_tokens, adopt_turns
from student_train.run.config import TrainConfig
from student_train.run.processes import decided_by_main
from teacher_cache.format import CacheHeader


@dataclass(frozen=True)
class LoadedStudent:
    """A student as the run begins with it."""

    model: PreTrainedModel  # float32, on the CPU; weights on "meta" but in the main process
    tokenizer: PreTrainedTokenizerBase
    head: HeadScaling
    fingerprint: str


@dataclass(frozen=True)
class _Found:
    """Everything that the main process tells the others about the student, but its weights."""

    shape: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    head: HeadScaling
    fingerprint: str
    parameters: dict[str, torch.Size]


def load_student(
    config: TrainConfig, headers: Sequence[CacheHeader], accelerator: Accelerator
) -> LoadedStudent:
    """Load and check the student in the main process; the others build its shape.

    They get its weights when it is placed (`sharding.place`), so that a machine holds them once
    until then, and read no file of the student.

    Args:
        config: Configuration of the run.
        headers: Header of each cache.
        accelerator: Accelerator of the run.

    Raises:
        CacheMismatchError: If the student does not fit a cache.
        DamagedFileError: If an earlier run wrote it, and it has changed since.
        ValueError: If it cannot be loaded, trained or written.
    """
    loaded: list[PreTrainedModel] = []

    def load() -> _Found:
        name = config.student
        check_saved(name)
        model, tokenizer = load_model(name, revision=config.student_revision, dtype=torch.float32)
        for header in headers:
            add_missing_tokens(name, tokenizer, header)
            check_student(name, model, tokenizer, header)
        make_savable(name, model)
        if config.chat_template == "cache":
            adopt_turns(name, tokenizer, headers[0])
        loaded.append(model)
        return _Found(
            model.config, tokenizer, head_of(model), student_fingerprint(model), _parameters(model)
        )

    found = decided_by_main(accelerator, load)
    model = loaded[0] if loaded else empty_model(found.shape)
    if _parameters(model) != found.parameters:
        raise ValueError(
            f"student {config.student!r}: its configuration gives other weights than its files, so "
            "only one process can train it (it may be quantised); use its unquantised weights"
        )
    return LoadedStudent(model, found.tokenizer, found.head, found.fingerprint)


def _parameters(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
