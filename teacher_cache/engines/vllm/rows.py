"""Rows of logprobs as vLLM's front end receives them: numpy arrays, kept unchanged.

vLLM turns every number of a row into a Python object, 130 of them per token at K = 64. The tap
replaces the two methods that do so, on our requests; `FlatLogprobs`, the
public container of these objects, is the fallback. Both give the same rows.

Letters: R rows (tokens with a distribution), K candidates per row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError

_PENDING = 32  # messages copied at a time: one numpy call costs as much as many rows


class ArrayRows:
    """The rows of one request, [R, 1 + K], copied from vLLM's messages."""

    def __init__(self, num_columns: int) -> None:
        """Take the first `num_columns` of every row: a batch is as wide as its widest request."""
        self.num_columns = num_columns
        self._pending_ids: list[Any] = []
        self._pending_logprobs: list[Any] = []
        self._ids: list[NDArray[np.int32]] = []
        self._logprobs: list[NDArray[np.float32]] = []

    def add(self, shipped: Sequence[Any]) -> None:
        """Take one message, which starts with ids and logprobs [n, 1 + K or more].

        The arrays are views into the message, which also holds the rows of all other requests of
        its step, and which they keep in memory: until _PENDING messages or rows have arrived.
        """
        ids, logprobs = shipped[0], shipped[1]
        if ids.shape[1] > self.num_columns:
            ids, logprobs = ids[:, : self.num_columns], logprobs[:, : self.num_columns]
        self._pending_ids.append(ids)
        self._pending_logprobs.append(logprobs)
        if len(self._pending_ids) == _PENDING or len(ids) >= _PENDING:
            self._copy_pending()

    def _copy_pending(self) -> None:
        for pending, copied, dtype in (
            (self._pending_ids, self._ids, np.int32),
            (self._pending_logprobs, self._logprobs, np.float32),
        ):
            copied.append(np.concatenate(pending, dtype=dtype))
            pending.clear()

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and logprobs, [R, 1 + K] each."""
        if self._pending_ids:
            self._copy_pending()
        if not self._ids:
            shape = (0, self.num_columns)
            return np.empty(shape, np.int32), np.empty(shape, np.float32)
        return np.concatenate(self._ids), np.concatenate(self._logprobs)


def tap(processor: Any, top_k: int) -> None:  # noqa: ANN401 (vLLM is untyped here)
    """Make the `LogprobsProcessor` of one request keep `ArrayRows` as its result.

    Its public attributes pass into `RequestOutput` untouched if only the final output is requested
    and nothing is detokenised, as in all requests here.
    """
    if processor.logprobs is not None:
        processor.logprobs = ArrayRows(1 + top_k)
        processor._update_sample_logprobs = processor.logprobs.add
    if processor.prompt_logprobs is not None:
        processor.prompt_logprobs = ArrayRows(1 + top_k)
        processor._update_prompt_logprobs = processor.prompt_logprobs.add


def to_rows(
    request_id: str,
    result: Any,  # noqa: ANN401 (vLLM is untyped here)
    top_k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and logprobs [R, 1 + K] from a `RequestOutput`, tapped or not.

    `FlatLogprobs` holds 1 + K entries per token, the token itself first, duplicates kept; a
    prompt's first token, over which there is no distribution, holds none and so gets no row.

    Raises:
        EngineError: If a token has another number of entries.
    """
    if isinstance(result, ArrayRows):
        return result.arrays()
    sizes = np.asarray(result.end_indices) - np.asarray(result.start_indices)
    if not np.isin(sizes, (0, 1 + top_k)).all() or (sizes[1:] == 0).any():
        raise EngineError(
            f"request {request_id!r}: expected {1 + top_k} entries per token from vLLM, "
            f"got {sorted(set(sizes.tolist()))}"
        )
    ids = np.array(result.token_ids, dtype=np.int32).reshape(-1, 1 + top_k)
    logprobs = np.array(result.logprobs, dtype=np.float32).reshape(-1, 1 + top_k)
    return ids, logprobs


def why_untapped() -> str | None:
    """Reason why the tap fails on the installed vLLM; None if it gives the same rows.

    A plain and a tapped processor of the installed vLLM get the same made-up messages.
    """
    try:
        stock, tapped = _fed_processor(is_tapped=False), _fed_processor(is_tapped=True)
        for name in ("logprobs", "prompt_logprobs"):
            rows = to_rows("the tap's check", getattr(stock, name), top_k=2)
            ours = to_rows("the tap's check", getattr(tapped, name), top_k=2)
            if not all(np.array_equal(one, other) for one, other in zip(rows, ours, strict=True)):
                return f"{name} differ"
    except (
        ImportError, AttributeError, TypeError, ValueError, LookupError, AssertionError, EngineError
    ) as error:  # whatever another version's internals raise  # fmt: skip
        return repr(error)
    return None


def _fed_processor(*, is_tapped: bool) -> Any:  # noqa: ANN401 (vLLM is untyped here)
    """A vLLM processor fed a prompt of 3 rows and two tokens; its batch is one column wider."""
    import torch
    from vllm.logprobs import create_prompt_logprobs, create_sample_logprobs
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    processor = LogprobsProcessor(
        tokenizer=None,
        logprobs=create_sample_logprobs(True),
        prompt_logprobs=create_prompt_logprobs(True),
        cumulative_logprob=0.0,
        num_logprobs=2,
        num_prompt_logprobs=2,
    )
    if is_tapped:
        tap(processor, top_k=2)
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    logprobs = -np.arange(12, dtype=np.float32).reshape(3, 4) / 3
    ranks = np.arange(3, dtype=np.int32)
    prompt = LogprobsTensors(*map(torch.from_numpy, (ids[:, :3], logprobs[:, :3], ranks)))
    sampled = [LogprobsLists(ids[r : r + 1], logprobs[r : r + 1], ranks[r : r + 1]) for r in (2, 0)]
    for lists in sampled:
        processor.update_from_output(
            EngineCoreOutput(
                request_id="0",
                new_token_ids=[int(lists.logprob_token_ids[0, 0])],
                new_logprobs=lists,
                new_prompt_logprobs_tensors=prompt,
            )
        )
        prompt = None
    return processor
