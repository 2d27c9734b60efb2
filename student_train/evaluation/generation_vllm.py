"""Completions of prompts by a student, with vLLM: for many prompts or a large student."""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from student_train.evaluation.config import Generation
from student_train.evaluation.requests import Request, Tokens, draw_seed
from teacher_cache.terminal.messages import others_into_log
from teacher_cache.terminal.progress import Progress


def generate_with_vllm(
    requests: Sequence[Request],
    config: Generation,
    end_ids: Collection[int] = (),
    done: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, Tokens]]:
    """Complete every prompt `config.samples_per_prompt` times, in an engine of this process.

    Args:
        requests: The prompts.
        config: Model and settings; vLLM batches by itself.
        end_ids: Tokens that end a completion, beside the model's own.
        done: Pairs (prompt, sample) to skip.

    Yields:
        Number of the prompt, number of the sample, and the tokens, as each finishes.
    """
    # In this process: an engine process would be one more that must be ended in every case.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would copy this process's threads
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # "auto" leaves a core unused
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout carries results
    with Progress("loading vLLM"), others_into_log():
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

    settings: dict[str, Any] = {
        "max_model_len": max(len(each.ids) + each.num_new_tokens for each in requests),
        "dtype": config.dtype or "auto",
        "seed": config.seed,
        "logprobs_mode": "raw_logprobs",  # at temperature 1, before top-p
    }
    if not torch.cuda.is_available():  # compiling takes longer than small models run
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    with Progress(f"starting vLLM for {config.model}"), others_into_log():
        engine = LLM(model=config.model, disable_log_stats=True, **settings).llm_engine
    asked: dict[str, tuple[int, int]] = {}
    for sample in range(config.samples_per_prompt):
        for prompt, request in enumerate(requests):
            if (prompt, sample) in done:
                continue
            params = SamplingParams(
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=request.num_new_tokens,
                stop_token_ids=sorted(end_ids),
                seed=draw_seed(config.seed, sample, prompt),
                detokenize=False,
                logprobs=0 if config.with_logprobs else None,  # of the sampled token alone
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = f"{prompt}/{sample}"
            engine.add_request(name, {"prompt_token_ids": list(request.ids)}, params)
            asked[name] = prompt, sample
    while asked:
        for output in engine.step():
            if output.finished:
                yield *asked.pop(output.request_id), _tokens(output.outputs[0])


def _tokens(output: Any) -> Tokens:  # noqa: ANN401  # vLLM's
    ids = tuple(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        found = zip(output.logprobs, ids, strict=True)
        logprobs = tuple(float(of_token[token].logprob) for of_token, token in found)
    return Tokens(ids, output.finish_reason == "stop", logprobs)
