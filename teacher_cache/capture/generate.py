"""`cache-teacher generate`: the teacher answers prompts, and its distributions are kept."""

import hashlib
from dataclasses import asdict

from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.capture.early_checks import check_early
from teacher_cache.capture.prepare import (
    input_rows,
    prepare_job,
    row_columns,
    run_job,
    teacher_tokenizer,
)
from teacher_cache.capture.run import CaptureReport
from teacher_cache.engines import Sampling, TeacherRequest
from teacher_cache.sources import PromptRenderer, SourceTrace
from teacher_cache.sources.tokenizer import ModelFiles


def generate(config: GenerateConfig) -> CaptureReport:
    """Let the teacher answer every prompt, and keep its distributions; raises as `capture`."""
    check_early(config, input_rows(config, config.prompts))
    files = ModelFiles(config.model, config.revision)
    tokenizer = teacher_tokenizer(config, files)
    own = files.generation_config()
    sampling = Sampling(
        temperature=own.temperature if config.temperature is None else config.temperature,
        top_p=own.top_p if config.top_p is None else config.top_p,
        top_k=own.top_k if config.sample_top_k is None else config.sample_top_k,
    )
    context = files.context_length(config.max_model_len)
    longest = min(context, config.stop_at_tokens or context)

    def requests(item: SourceTrace) -> list[TeacherRequest]:
        room = longest - len(item.token_ids)
        names = [item.trace_id]
        if config.samples_per_prompt > 1:
            names = [f"{item.trace_id}#{sample}" for sample in range(config.samples_per_prompt)]
        return [
            TeacherRequest(
                request_id=name,
                token_ids=item.token_ids,
                max_new_tokens=min(room, config.max_new_tokens or room),
                seed=_seed(config.seed, name),
                capture_prompt=config.capture_prompt,
            )
            for name in names
        ]

    recorded = {**asdict(sampling), "max_tokens": config.max_new_tokens, "seed": config.seed}
    if config.stop_at_tokens is not None:
        recorded["stop_at_tokens"] = config.stop_at_tokens
    render = PromptRenderer(tokenizer, longest, files.vocab_size(), row_columns(config))
    return run_job(
        config,
        prepare_job(config, files, tokenizer, config.prompts, render, requests, sampling, recorded),
    )


def _seed(seed: int, trace_id: str) -> int:
    """A sample's own seed: independent of the order in which samples are drawn."""
    digest = hashlib.sha256(f"{seed}:{trace_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
