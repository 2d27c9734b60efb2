"""The engines that generate, by name: prompts in, tokens out."""

from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from student_train.evaluation.config import Generation
from student_train.evaluation.generation import generate
from student_train.evaluation.requests import Request, Tokens
from student_train.model.load import load_model, stored_dtype


def generated(
    generation: Generation,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    end_ids: Collection[int],
    done: Collection[tuple[int, int]],
) -> Iterator[tuple[int, int, Tokens]]:
    """Complete every prompt that is not done, with the engine that was asked for.

    Args:
        generation: Model, engine and sampling.
        tokenizer: Tokenizer of the model.
        requests: The prompts.
        end_ids: Tokens that end a completion, beside the model's own.
        done: Pairs (prompt, sample) to skip.

    Yields:
        Number of the prompt, number of the sample, and the tokens, as they finish.
    """
    if generation.engine == "vllm":
        from student_train.evaluation.generation_vllm import generate_with_vllm

        yield from generate_with_vllm(requests, generation, end_ids, done)
        return
    dtype = None if generation.dtype is None else getattr(torch, generation.dtype)
    model, _ = load_model(generation.model, dtype=dtype)
    model.to(device()).eval()
    yield from generate(model, tokenizer, requests, generation, end_ids, done)


def usual_dtype(name: str) -> str | None:
    """Name of the dtype in which a model answers; None where nothing but its weights says."""
    dtype = stored_dtype(name)
    if dtype == torch.float32 and device().type == "cuda":
        dtype = torch.bfloat16
    return None if dtype is None else str(dtype).removeprefix("torch.")


def device() -> torch.device:
    """The device on which models answer."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
