"""Completions of prompts by a student, with vLLM: for many prompts or a large student."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.generation import Completion


def generate_with_vllm(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
    end_ids: Collection[int] = (),
) -> list[list[Completion]]:
    """Complete every prompt `config.samples_per_prompt` times, in an engine of this process.

    Args:
        tokenizer: Of the model.
        prompts: Token ids.
        config: Which model and how; vLLM batches by itself.
        end_ids: Tokens that end a completion, beside the model's own.

    Returns:
        One list per sample, with a completion per prompt in their order.

    Raises:
        ValueError: If a prompt leaves no room for an answer in the model's context.
    """
    # In this process: an engine of its own would be one more that must be ended in every case.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # "auto" leaves a core unused
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    model_config = AutoConfig.from_pretrained(config.model)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    settings: dict[str, Any] = {
        "max_model_len": _longest(prompts, config, context),
        # As it is stored; vLLM's "auto" would halve float32.
        "dtype": str(model_config.dtype or "auto").removeprefix("torch."),
        "seed": config.seed,
    }
    if not torch.cuda.is_available():  # compiling takes longer than small models run
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    engine = LLM(model=config.model, disable_log_stats=True, **settings)
    outputs = engine.generate(
        [{"prompt_token_ids": list(ids)} for ids in prompts],
        SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            stop_token_ids=sorted(end_ids),
            seed=config.seed,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    return [
        [_completion(tokenizer, output.outputs[sample]) for output in outputs]
        for sample in range(config.samples_per_prompt)
    ]


def _longest(prompts: Sequence[Sequence[int]], config: EvaluateConfig, context: int | None) -> int:
    """Tokens of the longest prompt and its answer, as far as the model's context reaches."""
    longest = max(len(ids) for ids in prompts)
    if context is None:
        return longest + config.max_new_tokens
    if longest >= context:
        raise ValueError(
            f"{config.prompts}: a prompt of {longest:,} tokens leaves no room for an answer in the "
            f"model's context of {context:,}"
        )
    return min(longest + config.max_new_tokens, context)


def _completion(tokenizer: PreTrainedTokenizerBase, output: Any) -> Completion:  # noqa: ANN401  # vLLM's
    ids = list(output.token_ids)
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return Completion(text, len(ids), finished=output.finish_reason == "stop")
