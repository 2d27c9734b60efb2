"""`cache-teacher score`: the teacher's distributions over existing traces."""

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
from teacher_cache.sources import SourceTrace, TraceRenderer, TraceSlice


def score(config: ScoreConfig) -> CaptureReport:
    """Keep the teacher's distributions over existing traces; raises as `capture`."""
    check_early(config, input_rows(config, config.traces))
    files = model_files(config)
    tokenizer = teacher_tokenizer(config, files)
    # vLLM, also behind a server, scores a trace as the prompt of one more token.
    num_reserved = config.engine in ("vllm", "server")
    context = files.context_length(config.max_model_len, num_reserved=num_reserved)

    def requests(item: SourceTrace) -> list[TeacherRequest]:
        return [
            TeacherRequest(
                request_id=item.trace_id,
                token_ids=item.token_ids[: lead_span_length(len(item.token_ids), config.lead_span)],
                max_new_tokens=0,
                seed=0,
                capture_prompt=True,
            )
        ]

    part = None if config.slice is None else TraceSlice.parse(config.slice)
    render = TraceRenderer(tokenizer, context, files.vocab_size(), row_columns(config), part)
    return run_job(
        config, prepare_job(config, files, tokenizer, config.traces, render, requests, None, None)
    )
