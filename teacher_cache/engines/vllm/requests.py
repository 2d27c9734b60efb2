"""A teacher's requests as vLLM takes them, and what it gives for them.

Letters: R rows (tokens with a distribution), K candidates per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError, Sampling, TeacherRequest, TeacherRows
from teacher_cache.engines.checks import check_rows
from teacher_cache.engines.vllm.rows import to_rows
from teacher_cache.engines.vllm.worker_rows import (
    WorkerRows,
    require_same_rows,
    require_same_tails,
)

_CHECK_TOKENS = 8
_CHECK_TOLERANCE = 1e-3  # nats; 4e-6 was measured on a CPU
_GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class Flight:
    """A request that the engine works on."""

    request: TeacherRequest
    slot: int | None = None  # of its rows from the worker; None if it has logprobs alone
    is_check: bool = False  # of the worker's rows, beside those that were asked for
    is_compared: bool = False  # has logprobs too, which its rows from the worker must equal
    reads_cache: bool = False  # its first tokens may be found in the prefix cache


def check_of(request: TeacherRequest) -> TeacherRequest:
    """The first tokens of a request, to compare the worker's rows with vLLM's own logprobs.

    Few tokens: while one request has logprobs, the worker computes them for its whole batch.
    """
    num_tokens = min(request.max_new_tokens, _CHECK_TOKENS)
    return replace(request, max_new_tokens=num_tokens, capture_prompt=False)


def sampling_params(
    request: TeacherRequest,
    sampling: Sampling | None,
    room: int,
    num_candidates: int,
    extra_args: Mapping[str, Any] | None = None,
    *,
    with_logprobs: bool,
    may_read_cache: bool,
) -> Any:  # noqa: ANN401 (vLLM is untyped here)
    """Settings of a request for vLLM.

    Args:
        request: The request; to score a trace is to draw a token after it, which is thrown away.
        sampling: How tokens are drawn; None for a request that is scored.
        room: Largest number of tokens that the context has room for after the given ones.
        num_candidates: K, if logprobs are requested.
        extra_args: For `worker_tap`.
        with_logprobs: Whether vLLM returns the logprobs of drawn tokens, or those of scored ones.
        may_read_cache: Whether tokens of a scored request may be found in the prefix cache, where
            they have no rows.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    scoring = request.max_new_tokens == 0
    given_logprobs = with_logprobs if scoring else request.capture_prompt
    drawing = _GREEDY if scoring or sampling is None else sampling
    return SamplingParams(
        n=1,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        top_k=drawing.top_k,
        min_p=drawing.min_p,
        repetition_penalty=drawing.repetition_penalty,
        stop_token_ids=list(drawing.stop_ids),
        seed=request.seed,
        max_tokens=1 if scoring else min(request.max_new_tokens, room),
        logprobs=num_candidates if with_logprobs and not scoring else None,
        prompt_logprobs=num_candidates if given_logprobs else None,
        skip_reading_prefix_cache=True if scoring and not may_read_cache else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra_args,
    )


def finished_rows(
    flight: Flight,
    output: Any,  # noqa: ANN401 (vLLM is untyped here)
    num_candidates: int,
    worker_rows: WorkerRows | None,
    vocab_size: int,
) -> TeacherRows | None:
    """The rows of a request that the engine has finished; None if the worker's are not all here.

    Raises:
        EngineError: If the engine gave it up, or its rows are wrong.
    """
    request, completion = flight.request, output.outputs[0]
    where = f"request {request.request_id!r}"
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(f"{where}: vLLM ended it as {completion.finish_reason!r}")
    if request.max_new_tokens == 0:
        return _scored_rows(flight, output, num_candidates, worker_rows, vocab_size)
    generated = list(completion.token_ids)
    found = None
    if flight.slot is not None and worker_rows is not None:
        found = worker_rows.rows(flight.slot, len(generated))
        if found is None:
            return None
    pieces, tails = [], None
    if request.capture_prompt:
        pieces.append(to_rows(request.request_id, output.prompt_logprobs, num_candidates))
    if found is not None:
        without_tail = np.full(sum(len(ids) for ids, _ in pieces), np.nan, np.float32)
        pieces.append(found[:2])
        tails = np.concatenate([without_tail, found[2]])
    else:
        pieces.append(to_rows(request.request_id, completion.logprobs, num_candidates))
    if flight.is_compared and found is not None:
        stock = to_rows(request.request_id, completion.logprobs, num_candidates)
        require_same_rows(where, found[:2], stock, _CHECK_TOLERANCE)
        require_same_tails(where, found[2], stock[1], vocab_size)
    rows = TeacherRows(
        request_id=request.request_id,
        token_ids=np.array([*request.token_ids, *generated], dtype=np.int32),
        num_given=len(request.token_ids),
        first_row=1 if request.capture_prompt else len(request.token_ids),
        row_ids=_together([ids for ids, _ in pieces]),
        row_logprobs=_together([logprobs for _, logprobs in pieces]),
        finish_reason=completion.finish_reason,
        row_tails=tails,
    )
    check_rows(rows)
    return rows


def _scored_rows(
    flight: Flight,
    output: Any,  # noqa: ANN401 (vLLM is untyped here)
    num_candidates: int,
    worker_rows: WorkerRows | None,
    vocab_size: int,
) -> TeacherRows | None:
    """The rows of a trace that was scored; None if the worker's are not all here."""
    request, tails, first_row = flight.request, None, 1
    if flight.slot is None or worker_rows is None:
        ids, logprobs = to_rows(request.request_id, output.prompt_logprobs, num_candidates)
    else:
        first_row = request.first_row
        found = worker_rows.rows(flight.slot, len(request.token_ids) - first_row)
        if found is None:
            return None
        ids, logprobs, tails = found
    if flight.is_compared and tails is not None:
        where = f"request {request.request_id!r}"
        stock = to_rows(request.request_id, output.prompt_logprobs, num_candidates)
        wanted = stock[0][first_row - 1 :], stock[1][first_row - 1 :]
        require_same_rows(where, (ids, logprobs), wanted, _CHECK_TOLERANCE)
        require_same_tails(where, tails, wanted[1], vocab_size)
    rows = TeacherRows(
        request_id=request.request_id,
        token_ids=np.array(request.token_ids, dtype=np.int32),
        num_given=len(request.token_ids),
        first_row=first_row,
        row_ids=ids,
        row_logprobs=logprobs,
        finish_reason="scored",
        row_tails=tails,
    )
    check_rows(rows)
    return rows


def _together(pieces: list[NDArray[Any]]) -> NDArray[Any]:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
