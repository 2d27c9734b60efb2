"""The student: loaded, checked against the cache, wrapped with its loss, saved.

Letters: B traces, T positions, N valid tokens, D hidden size, V vocabulary.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from student_train.batch import MicroBatch
from student_train.config import TrainConfig
from student_train.losses import sparse_kl
from student_train.run_folder import publish_folder
from teacher_cache.format import CacheHeader, CacheMismatchError, tokenizer_fingerprint

# What StudentWithLoss sums over valid tokens, beside the loss.
SUMS = ("kl", "ce", "student_mass", "teacher_mass", "top1_agreement")

_PROBE_LENGTH = 8
_PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a forgotten scale or cap is far off


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Loading and writing last seconds: their bars would only stand in the way of messages."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def load_model(
    name: str, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: Folder or hub id.
        revision: Of the hub repository.
        dtype: Of the weights; as they are stored where None.

    Raises:
        ValueError: If it cannot be loaded, saying why in one line.
    """
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ValueError(f"model {name!r} cannot be loaded: there is no such folder")
    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype or "auto"
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    return model, tokenizer


def check_student(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: CacheHeader
) -> None:
    """Refuse a student whose token ids do not mean what the cache's mean.

    Raises:
        CacheMismatchError: Naming both sides.
    """
    vocabulary = tokenizer.get_vocab()
    fingerprint = tokenizer_fingerprint(vocabulary)
    if fingerprint != header.tokenizer_fingerprint:
        raise CacheMismatchError(
            f"student {name!r} has a tokenizer of {len(vocabulary)} tokens (fingerprint "
            f"{fingerprint[:8]}), the cache was made with teacher {header.teacher!r} and its "
            f"tokenizer of {header.tokenizer_size} (fingerprint "
            f"{header.tokenizer_fingerprint[:8]}). Teacher and student must share a tokenizer."
        )
    num_rows = output_layer(model).weight.shape[0]
    if num_rows < header.vocab_size:
        raise CacheMismatchError(
            f"student {name!r} has a vocab_size of {num_rows}, the cache's teacher "
            f"{header.teacher!r} has {header.vocab_size}: the cache may hold ids that the student "
            "lacks. Choose a student with at least the teacher's vocab_size."
        )


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to logits.

    Raises:
        ValueError: If the model is not a body with such a layer on top.
    """
    output: object = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or model.base_model is model:
        raise ValueError(f"{type(model).__name__}: expected a body and a linear head on top of it")
    return output


def head_of(model: PreTrainedModel) -> Head:
    """What stands between the body's hidden states and the logits, beside a linear map.

    Raises:
        ValueError: If the model's logits are not what the loss would compute.
    """
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    head = Head(scale, getattr(config, "final_logit_softcapping", None))
    _check_head(model, head)
    return head


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: Head) -> None:
    """Compare the model's own logits of a few tokens with those that the loss would use."""
    output = output_layer(model)
    was_training = model.training
    model.train(mode=False)
    device = output.weight.device
    ids = torch.arange(_PROBE_LENGTH, device=device)[None] % output.weight.shape[0]
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = output(hidden).float() * head.logit_scale
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    model.train(was_training)
    if not expected.isfinite().all():
        raise ValueError(
            f"{type(model).__name__}: its logits are no finite numbers; is it damaged?"
        )
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= _PROBE_TOLERANCE:
        raise ValueError(
            f"{type(model).__name__}: its logits are not softcap(scale * linear(hidden)) with "
            f"logit_scale={head.logit_scale} and softcap={head.softcap} from its config (they "
            f"differ by {error:.1%}); the loss would train another model. This is not supported."
        )


def student_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the names, shapes and first values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        first = parameter.detach().flatten()[:1024].float().cpu()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:32]


class StudentWithLoss(nn.Module):
    """Body and loss in one forward, so that a sharded head is whole where the loss uses it."""

    def __init__(self, model: PreTrainedModel, head: Head, ce_weight: float) -> None:
        super().__init__()
        self.model = model
        self._head = head
        self._ce_weight = ce_weight

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Returns:
            The loss [], weighted and summed over valid tokens, and the detached sums over valid
            tokens [5] float64 of `SUMS`.
        """
        hidden_BTD = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        output = output_layer(self.model)
        result = sparse_kl(
            hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index),
            output.weight,
            batch.targets,
            batch.token_weight,
            bias=output.bias,
            ce_weight=self._ce_weight,
            softcap=self._head.softcap,
            logit_scale=self._head.logit_scale,
        )
        parts = (result.kl, result.ce, result.student_mass, result.teacher_mass, result.top1)
        return result.loss, torch.stack([part.double().sum() for part in parts])


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    terminal_token_ids: tuple[int, ...],
    card: str,
) -> None:
    """Write a Hugging Face model folder; it is whole, or not there under its name.

    Args:
        model: Unwrapped.
        tokenizer: Of the student.
        folder: Where; must not exist.
        terminal_token_ids: Any of them ends a generation; the model's own where empty.
        card: The model card, Markdown.
    """
    if terminal_token_ids:
        # Base models often name another token, and would then never end as the traces do.
        model.generation_config.eos_token_id = list(terminal_token_ids)
    with publish_folder(folder) as temporary, _no_bars():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: TrainConfig, header: CacheHeader, cache_fingerprint: str, metrics: Mapping[str, Any]
) -> str:
    """What the student was made of, in Markdown.

    Args:
        config: Of the run.
        header: Of the cache.
        cache_fingerprint: Of its content.
        metrics: The last step's.
    """
    rows = "\n".join(f"| {name} | {metrics[name]:.4f} |" for name in ("loss", *SUMS))
    revision = f" (revision {header.teacher_revision})" if header.teacher_revision else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, leadspan]
---

# {Path(config.student).name}, distilled from {Path(header.teacher).name}

Trained with leadspan on a cache of the teacher's top-k logits; no teacher was in memory.

- student: `{config.student}`
- teacher: `{header.teacher}`{revision}, weights {header.teacher_fingerprint}
- cache: fingerprint {cache_fingerprint}
- trained on: {config.selection}
- loss: {1 - config.ce_weight:g} KL(teacher || student) over the kept entries and one bucket for
  the tail + {config.ce_weight:g} cross entropy, every {config.normalise[:-1]} weighing the same
- optimiser: AdamW, lr {config.lr:g} ({config.schedule}, warm-up {config.warmup:g}), weight decay
  {config.weight_decay:g}, gradient norm at most {config.clip_norm:g}
- {metrics["step"]} steps of {config.batch_traces} traces, seed {config.seed}

Last step, per token, in nats or as a proportion:

| metric | value |
| --- | --- |
{rows}
"""
