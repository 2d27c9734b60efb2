"""Completions of prompts by a student, with transformers."""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.evaluation.config import Generation
from student_train.evaluation.requests import Request, Tokens, draw_seed
from student_train.losses import Objective, outcome_logprobs
from student_train.model.load import HeadScaling, head_of, output_layer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    config: Generation,
    end_ids: Collection[int] = (),
    done: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, Tokens]]:
    """Complete every prompt `config.samples_per_prompt` times, in batches of similar length.

    Args:
        model: Causal language model, in evaluation mode.
        tokenizer: Tokenizer of the model.
        requests: The prompts.
        config: How to generate.
        end_ids: Tokens that end a completion, beside the model's own.
        done: Pairs (prompt, sample) to skip; a batch of nothing else is left out, without effect
            on the results of other batches.

    Yields:
        Number of the prompt, number of the sample, and the tokens, batch by batch.
    """
    head = head_of(model) if config.with_logprobs else None
    ends = sorted(end_tokens(model) | set(end_ids))
    batches = list(_batches(requests, config.batch_size))
    for sample in range(config.samples_per_prompt):
        for number, batch in enumerate(batches):
            wanted = [prompt for prompt in batch if (prompt, sample) not in done]
            if not wanted:
                continue
            torch.manual_seed(draw_seed(config.seed, sample, number))
            asked = [requests[prompt] for prompt in batch]
            rows = [_ended(ids, ends) for ids in _complete(model, tokenizer, asked, config, ends)]
            if head is not None:
                rows = _with_logprobs(model, head, asked, rows)
            for prompt, tokens in zip(batch, rows, strict=True):
                if prompt in wanted:
                    yield prompt, sample, tokens


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end a generation according to the model's configuration."""
    ids = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or ())


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts by batch; prompts of a batch have equal room and similar length."""

    def order(prompt: int) -> tuple[int, int]:
        return requests[prompt].num_new_tokens, len(requests[prompt].ids)

    by_room = groupby(sorted(range(len(requests)), key=order), key=lambda prompt: order(prompt)[0])
    for _, alike in by_room:
        prompts = list(alike)
        for start in range(0, len(prompts), batch_size):
            yield prompts[start : start + batch_size]


@torch.inference_mode()
def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Request],
    config: Generation,
    ends: Sequence[int],
) -> list[list[int]]:
    """Token ids after each prompt of a batch, padded after the end."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    longest = max(len(request.ids) for request in batch)
    # On the left, so that every prompt ends where the generation begins.
    rows = [[pad_id] * (longest - len(request.ids)) + list(request.ids) for request in batch]
    mask = [[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in batch]
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=batch[0].num_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
        top_k=None,
        **sampling,
    )
    ids: list[list[int]] = output[:, longest:].tolist()
    return ids


def _ended(ids: list[int], end_ids: Sequence[int]) -> Tokens:
    """Cut the batch's padding after the end token."""
    end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), None)
    return Tokens(tuple(ids[:end]), finished=end is not None)


@torch.inference_mode()
def _with_logprobs(
    model: PreTrainedModel, head: HeadScaling, batch: Sequence[Request], rows: Sequence[Tokens]
) -> list[Tokens]:
    """Logprobs of what was written, from one pass over prompts and completions.

    The logits of all tokens never exist at once, as they would if generation kept them. Rows are
    padded on the right, where no token looks.
    """
    whole = [[*one.ids, *row.ids] for one, row in zip(batch, rows, strict=True)]
    width = max(map(len, whole))
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in whole], device=model.device)
    index = [
        number * width + place - 1  # the position that predicts the token
        for number, (one, ids) in enumerate(zip(batch, whole, strict=True))
        for place in range(len(one.ids), len(ids))
    ]
    written = torch.tensor([i for row in rows for i in row.ids], device=model.device)[:, None]
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    output = output_layer(model)
    logprobs_N2 = outcome_logprobs(
        hidden_BTD.flatten(0, 1)[index],
        output.weight,
        written,
        torch.ones_like(written, dtype=torch.bool),
        Objective(softcap=head.softcap, logit_scale=head.logit_scale),
        bias=output.bias,
    )
    found = iter(logprobs_N2[:, 0].tolist())
    return [Tokens(row.ids, row.finished, tuple(islice(found, len(row.ids)))) for row in rows]
