"""The card of a finished student: its origin, in Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_train.data.traces import TrainingData
from student_train.model.forward import SUMS
from student_train.run.config import TrainConfig
from teacher_cache.format import Cache


def model_card(
    config: TrainConfig, data: TrainingData, metrics: Mapping[str, Any], num_steps: int
) -> str:
    """Describe the student's origin, in Markdown.

    Args:
        config: Configuration of the run.
        data: Traces that it was trained on.
        metrics: Metrics of the step whose weights these are.
        num_steps: Number of steps of the run.
    """
    prefixes = ("heldout_", "kl_cache_")
    names = [name for name in metrics if name in ("loss", *SUMS) or name.startswith(prefixes)]
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
- lead spans: {metrics["mean_lead_span"]:.3f} of a trace on average,
  {metrics["whole_trace_share"]:.1%} of the traces whole
- traces: {data.summary}{f", where `{config.where}`" if config.where else ""}
- loss: {config.loss_text},
  averaged over every {config.loss_reduction}
- weights trained: {weights}
- optimizer: {config.optimizer}, lr {config.lr:g} ({config.schedule}, warm-up {config.warmup:g}),
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
