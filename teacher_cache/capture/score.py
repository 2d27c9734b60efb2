"""`cache-teacher score`: the teacher's distributions over existing traces."""

from collections.abc import Mapping
from typing import Any

from teacher_cache.capture.configs import ScoreConfig
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
from teacher_cache.engines import TeacherRequest
from teacher_cache.format import lead_span_length
from teacher_cache.sources import SourceError, SourceTrace, TraceRenderer, TraceSlice
from teacher_cache.sources.rollouts import facts_of_input
from teacher_cache.sources.tokenizer import TeacherTokenizer


def score(config: ScoreConfig) -> CaptureReport:
    """Keep the teacher's distributions over existing traces; raises as `capture`."""
    check_early(config, input_rows(config, config.traces))
    files = model_files(config)
    tokenizer = teacher_tokenizer(config, files)
    rollout = facts_of_input(input_rows(config, config.traces))
    if rollout is not None:
        _check_rollout(config, rollout, tokenizer)
    # vLLM, also behind a server, scores a trace as the prompt of one more token.
    num_reserved = config.engine in ("vllm", "server")
    context = files.context_length(config.max_model_len, num_reserved=num_reserved)

    def requests(item: SourceTrace) -> list[TeacherRequest]:
        ids = item.token_ids[: lead_span_length(len(item.token_ids), config.lead_span)]
        first_row = 1 if config.capture_prompt else max(1, min(item.num_prompt, len(ids)))
        return [TeacherRequest(item.trace_id, ids, 0, 0, capture_prompt=True, first_row=first_row)]

    part = None if config.slice is None else TraceSlice.parse(config.slice)
    render = TraceRenderer(
        tokenizer, context, files.vocab_size(), row_columns(config), part, config.lead_span, rollout
    )
    job = prepare_job(
        config, files, tokenizer, config.traces, render, requests, None, None, rollout
    )
    return run_job(config, job)


def _check_rollout(
    config: ScoreConfig, rollout: Mapping[str, Any], tokenizer: TeacherTokenizer
) -> None:
    """Refuse rollouts that the teacher cannot read as they are.

    Raises:
        SourceError: If it has another tokenizer than their student.
        ValueError: If they would be cut.
    """
    if rollout["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise SourceError(
            f"{config.traces}: these rollouts are of student {rollout.get('student')!r}, whose "
            f"tokenizer (fingerprint {str(rollout['tokenizer_fingerprint'])[:8]}) is not the "
            f"teacher's ({tokenizer.fingerprint[:8]}). A student's own tokens are scored as they "
            "are: choose a teacher with its tokenizer; or score their text, which are rows of id, "
            "messages and response alone, and carry the cache over with `cache-teacher retokenize`"
        )
    if config.slice is not None:
        raise ValueError("--slice: rollouts are scored whole; leave it out")
