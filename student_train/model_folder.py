"""The finished student as a Hugging Face folder, with a card that says what it was made of."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.config import TrainConfig
from student_train.data import TrainingData
from student_train.forward import SUMS
from student_train.run_folder import publish_folder
from student_train.student import no_bars
from teacher_cache.format import Cache

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def make_savable(name: str, model: PreTrainedModel) -> None:
    """See to it before a run that its student can be written after it.

    `transformers` reads generation configs that it refuses to write: often they name a temperature
    and do not say that they sample. Here they are made to say so.

    Args:
        name: Of the student, for messages.
        model: Whose generation config may be changed.

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
        raise ValueError(f"student {name!r}: mend its generation_config.json: {reason}") from error
    logger.warning("%s: its generation config asks for sampling without do_sample: added", name)


def save_student(
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    terminal_token_ids: tuple[int, ...],
    card: str,
) -> None:
    """Write a Hugging Face model folder; it is whole, or not there under its name.

    Args:
        model: Unwrapped; or adapters, of which the folder then holds nothing else.
        tokenizer: Of the student.
        folder: Where; must not exist.
        weights: Of the model, whole.
        terminal_token_ids: Any of them ends a generation; the model's own where empty.
        card: The model card, Markdown.

    Raises:
        OSError: If it cannot be written, as on a full disk.
    """
    if terminal_token_ids:
        # Base models often name another token, and would then never end as the traces do.
        model.generation_config.eos_token_id = list(terminal_token_ids)
    with publish_folder(folder) as temporary, no_bars():
        try:
            model.save_pretrained(str(temporary), state_dict=dict(weights))
        except SafetensorError as error:
            raise OSError(f"{folder}: the student cannot be written: {error}") from error
        model.generation_config.save_pretrained(temporary)  # beside adapters there would be none
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: TrainConfig, data: TrainingData, metrics: Mapping[str, Any], num_steps: int
) -> str:
    """What the student was made of, in Markdown.

    Args:
        config: Of the run.
        data: What it was trained on.
        metrics: Of the step whose weights these are.
        num_steps: Of the run.
    """
    names = [name for name in metrics if name in ("loss", *SUMS) or name.startswith("heldout_")]
    rows = "\n".join(f"| {name} | {metrics[name]:.4f} |" for name in names)
    caches = [source.cache for source in data.sources]
    teachers = "\n".join(_teacher_and_cache(cache) for cache in caches)
    is_adapter = config.lora_rank is not None and config.lora_output == "adapter"
    weights = "all"
    if config.lora_rank is not None:
        weights = (
            f"LoRA of rank {config.lora_rank}, alpha {config.lora_alpha}, on "
            f"{', '.join(config.lora_targets)}; {config.lora_output}"
        )
    teacher_names = " and ".join(dict.fromkeys(Path(cache.header.teacher).name for cache in caches))
    return f"""---
library_name: {"peft" if is_adapter else "transformers"}
base_model: {config.student}
pipeline_tag: text-generation
tags: [distillation, leadspan]
---

# {Path(config.student).name}, distilled from {teacher_names}

Trained with leadspan on a cache of the teacher's top-k logits; no teacher was in memory.

- student: `{config.student}`
{teachers}
- trained on: {config.selection}; {metrics["cot_share"]:.1%} of the chains of thought
- traces: {data.summary}{f", where `{config.where}`" if config.where else ""}
- loss: {1 - config.ce_weight:g} KL(teacher || student) over the kept entries and one bucket for
  the tail + {config.ce_weight:g} cross entropy, every {config.normalise[:-1]} weighing the same
- weights trained: {weights}
- optimiser: {config.optimizer}, lr {config.lr:g} ({config.schedule}, warm-up {config.warmup:g}),
  weight decay {config.weight_decay:g}, gradient norm at most {config.clip_norm:g}
- {num_steps} steps of {config.batch_traces} traces, seed {config.seed}

After step {metrics["step"]}, per token, in nats or as a proportion:

| metric | value |
| --- | --- |
{rows}
"""


def _teacher_and_cache(cache: Cache) -> str:
    header = cache.header
    revision = f" (revision {header.teacher_revision})" if header.teacher_revision else ""
    return (
        f"- teacher: `{header.teacher}`{revision}, weights {header.teacher_fingerprint}\n"
        f"- cache: fingerprint {cache.fingerprint}"
    )
