"""`cache-teacher generate`: the teacher answers prompts, and its distributions are kept."""

import hashlib
import logging
from dataclasses import asdict

from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.capture.early_checks import check_early
from teacher_cache.capture.prepare import (
    input_rows,
    model_files,
    prepare_job,
    row_columns,
    run_job,
    teacher_tokenizer,
)
from teacher_cache.capture.run import CaptureReport
from teacher_cache.engines import Sampling, TeacherRequest
from teacher_cache.sources import PromptRenderer, SourceTrace

logger = logging.getLogger(__name__)


def generate(config: GenerateConfig) -> CaptureReport:
    """Let the teacher answer every prompt, and keep its distributions; raises as `capture`."""
    check_early(config, input_rows(config, config.prompts))
    files = model_files(config)
    tokenizer = teacher_tokenizer(config, files)
    own = files.generation_config()
    sampling = Sampling(
        temperature=own.temperature if config.temperature is None else config.temperature,
        top_p=own.top_p if config.top_p is None else config.top_p,
        top_k=own.top_k if config.sample_top_k is None else config.sample_top_k,
        min_p=own.min_p if config.min_p is None else config.min_p,
        repetition_penalty=own.repetition_penalty
        if config.repetition_penalty is None
        else config.repetition_penalty,
        stop_ids=tokenizer.terminal_ids,
    )
    max_new_tokens = config.max_new_tokens or own.max_new_tokens
    if own.left_out:
        logger.warning(
            "ignoring %s, which the model's generation config also sets",
            ", ".join(own.left_out),
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
                max_new_tokens=min(room, max_new_tokens or room),
                seed=_seed(config.seed, name),
                capture_prompt=config.capture_prompt,
            )
            for name in names
        ]

    # Tokens that end a trace have their own field in the header.
    recorded = {name: v for name, v in asdict(sampling).items() if name != "stop_ids"}
    recorded |= {"max_tokens": max_new_tokens, "seed": config.seed}
    if config.stop_at_tokens is not None:
        recorded["stop_at_tokens"] = config.stop_at_tokens
    render = PromptRenderer(tokenizer, longest, files.vocab_size(), row_columns(config))
    return run_job(
        config,
        prepare_job(config, files, tokenizer, config.prompts, render, requests, sampling, recorded),
    )


def _seed(seed: int, trace_id: str) -> int:
    """Seed of one sample, independent of the order in which samples are drawn."""
    digest = hashlib.sha256(f"{seed}:{trace_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
