"""The finished student as a Hugging Face folder, written whole or not at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.model.load import no_bars
from teacher_cache.format.checksums import (
    CHECKSUMS_NAME,
    check_folder,
    publish_record,
    read_record,
    write_checksums,
)
from teacher_cache.format.files import publish_folder

if TYPE_CHECKING:
    from peft import PeftModel

_CARD = "README.md"
_TEACHERS = "teachers.json"

logger = logging.getLogger(__name__)


def make_savable(name: str, model: PreTrainedModel) -> None:
    """Make sure before a run that its student can be written after it.

    `transformers` reads generation configs that it refuses to write: often they set a temperature
    but not do_sample. This function sets it.

    Args:
        name: Name of the student, for messages.
        model: Model whose generation config may be changed.

    Raises:
        ValueError: If the config contradicts itself in another way.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"student {name!r}: fix its generation_config.json: {reason}") from error
    logger.warning("%s: its generation config asks for sampling without do_sample: added", name)


def save_student(
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    terminal_token_ids: tuple[int, ...],
    card: str,
    teachers: Mapping[str, str],
) -> None:
    """Write a Hugging Face model folder; under its name it is whole or missing.

    Args:
        model: Unwrapped model; or adapters, and then the folder holds only them.
        tokenizer: Tokenizer of the student.
        folder: Folder to write; must not exist.
        weights: Whole weights of the model.
        dtype: Dtype in which a model is written; adapters stay as they are.
        terminal_token_ids: Ids that end a generation; the model's own where empty.
        card: Model card, Markdown.
        teachers: Fingerprint -> name of every teacher that it has learned from.

    Raises:
        OSError: If it cannot be written, as on a full disk.
        ValueError: If a weight is too large for the dtype.
    """
    if terminal_token_ids:
        # Base models often name another end token, and would then never end as the traces do.
        model.generation_config.eos_token_id = list(terminal_token_ids)
        model.config.eos_token_id = list(terminal_token_ids)
    is_adapter = not isinstance(model, PreTrainedModel)
    if not is_adapter:
        weights = _in_dtype(weights, dtype)
    with publish_folder(folder) as temporary, no_bars():
        try:
            model.save_pretrained(str(temporary), state_dict=dict(weights))
        except SafetensorError as error:
            raise OSError(f"{folder}: the student cannot be written: {error}") from error
        if not is_adapter:  # which took the dtype of the model in memory
            model.config.dtype = dtype
            model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)  # beside adapters there would be none
        tokenizer.save_pretrained(temporary)
        (temporary / _CARD).write_text(card, encoding="utf-8")
        publish_record(temporary / _TEACHERS, {"teachers": dict(teachers)})
        write_checksums(temporary, leave_out=[_CARD])  # which people edit


def _in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype; what is one tensor under several names stays one.

    Raises:
        ValueError: If a weight is too large for the dtype.
    """
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for name, weight in weights.items():
        key = weight.data_ptr(), weight.shape
        if key in cast:
            continue
        cast[key] = weight.to(dtype) if weight.is_floating_point() else weight
        if not cast[key].isfinite().all():
            raise ValueError(
                f"--save-dtype: {name} has values up to {float(weight.abs().max()):.3g}, too large "
                f"for {str(dtype).removeprefix('torch.')}; name a wider dtype and run the same "
                "command again"
            )
    return {name: cast[weight.data_ptr(), weight.shape] for name, weight in weights.items()}


def check_saved(name: str) -> None:
    """Refuse a student of `save_student` that has changed since it was written.

    Args:
        name: Folder or hub id; only folders with checksums are read.

    Raises:
        DamagedFileError: Naming the file.
    """
    folder = Path(name)
    if (folder / CHECKSUMS_NAME).is_file():
        check_folder(
            folder,
            f"Restore it from a copy; or, if it was changed on purpose, remove "
            f"{folder / CHECKSUMS_NAME}.",
        )


def read_teachers(name: str) -> dict[str, str]:
    """Fingerprint -> name of the teachers that a student of `save_student` has learned from.

    Empty for every other model.

    Raises:
        DamagedFileError: If the record is damaged.
    """
    file = Path(name) / _TEACHERS
    if not file.is_file():
        return {}
    remedy = "Restore it from a copy, or train the student again."
    teachers: dict[str, str] = read_record(file, remedy)["teachers"]
    return teachers
