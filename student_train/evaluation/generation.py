"""Completions of prompts by a student, with transformers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.evaluation.config import EvaluateConfig


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str  # special tokens included
    num_tokens: int  # the end token included
    finished: bool  # whether it ended by itself


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
    end_ids: Collection[int] = (),
) -> list[Completion]:
    """Complete every prompt once, in batches of similar length.

    Args:
        model: Causal language model, in evaluation mode.
        tokenizer: Of the model.
        prompts: Token ids.
        config: How.
        end_ids: Tokens that end a completion, beside the model's own.

    Returns:
        One completion per prompt, in their order.
    """
    torch.manual_seed(config.seed)
    ends = sorted(end_tokens(model) | set(end_ids))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    done: dict[int, Completion] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), config.batch_size):
        group = by_length[start : start + config.batch_size]
        longest = len(prompts[group[-1]])
        # On the left, so that every prompt ends where the generation begins.
        rows = [[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in group]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=config.max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=pad_id,
                top_k=None,
                **sampling,
            )
        for index, ids in zip(group, output[:, longest:].tolist(), strict=True):
            done[index] = _completion(tokenizer, ids, ends)
    return [done[index] for index in range(len(prompts))]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end a generation, by the model's own configuration."""
    ids = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or ())


def _completion(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: Sequence[int]
) -> Completion:
    """Cut what the batch padded behind the end token."""
    end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), None)
    kept = ids[:end]
    text = str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
    return Completion(text, len(kept), finished=end is not None)
