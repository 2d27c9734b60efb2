"""Rows that vLLM's worker takes from the logits (`worker_tap`), on this process's side.

Letters: R rows (tokens with a distribution), K candidates per row.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError, Sampling
from teacher_cache.engines.vllm.pages import RowPages
from teacher_cache.engines.vllm.ring import HEAD_WORDS, RowRing, row_words
from teacher_cache.engines.vllm.start import IN_ONE_PROCESS

logger = logging.getLogger(__name__)

# Of a ring, in steps of the largest batch. The worker is at most three steps ahead of the messages
# that make us read it, so that it never waits for us while we wait for it.
_STEPS = 8
# A step that ends no prompt sends no message: a whole trace is scored before we read, and what
# began in its company.
_SCORING_STEPS = 3  # of the most tokens that a step computes, beside the longest trace
_SCORING_TOKENS = 3 * 16_384  # vLLM's own largest step
_FEWEST_BYTES = 64 << 20  # a reader that waits for a slow store does not stop the engine at once

PROCESSOR = "teacher_cache.engines.vllm.worker_tap:RowTap"
EXTENSION = "teacher_cache.engines.vllm.worker_scoring.ScoringExtension"
RING_VARIABLE = "LEADSPAN_ROW_RING"  # address of the ring, for the processes of one engine
REQUEST_KEY = "leadspan"  # in `SamplingParams.extra_args`: [slot, serial, tokens of the prompt]
SCORED_KEY = "leadspan_scored"  # of a scored request: [slot, serial, first token with a row]
NO_SLOT = -1  # of a request whose rows nobody wants, and which only makes the engine step

# Of probability: of a difference from 1 in float32, and of a sum over the vocabulary.
_TAIL_TOLERANCE = 3e-5
_TAIL_TOLERANCE_PER_ID = 2e-9

_SLOWER = "reading rows from vLLM's logprobs, which is slower: %s"
_SCORED_SLOWER = "scoring from vLLM's prompt logprobs, which is slower: %s"
_ONE_MACHINE = (None, "mp", "uni", IN_ONE_PROCESS)


class WorkerRows:
    """The rows of the requests in flight of one engine, and the ring that they come through."""

    def __init__(
        self,
        *,
        num_candidates: int,
        max_num_seqs: int,
        engine_args: Mapping[str, Any],
        longest: int = 0,
    ) -> None:
        """Make the ring.

        Args:
            num_candidates: K.
            max_num_seqs: Largest number of rows that one engine step draws.
            engine_args: Arguments by which the engine is to load what writes into the ring.
            longest: Tokens of the longest trace to be scored, if known.
        """
        self.engine_args = engine_args
        fewest = _FEWEST_BYTES // (4 * row_words(num_candidates))
        self._capacity = max(_STEPS * max_num_seqs, fewest, longest + _SCORING_TOKENS)
        self._ring = RowRing.made(self._capacity, num_candidates)
        self.are_scored = False  # whether scored requests send rows too
        self._num_candidates = num_candidates
        self._serials = itertools.count(1)

    @contextmanager
    def offered(self) -> Iterator[None]:
        """Let processes that start inside the block find the ring."""
        os.environ[RING_VARIABLE] = self._ring.address
        try:
            yield
        finally:
            del os.environ[RING_VARIABLE]

    def are_sent(self, vllm_config: Any) -> bool:  # noqa: ANN401 (vLLM is untyped here)
        """Whether an engine that started with this `VllmConfig` sends rows; or log why not."""
        num_openers = ("logits_processors" in self.engine_args) + self.are_scored
        if not num_openers:
            return False
        is_second = getattr(vllm_config, "use_v2_model_runner", False)
        if self._ring.num_writers != num_openers:
            reason = f"the ring of rows was opened {self._ring.num_writers} times"
        elif (
            "logits_processors" in self.engine_args  # scored tokens are known beforehand
            and vllm_config.scheduler_config.async_scheduling
            and not is_second
        ):
            reason = "asynchronous scheduling with the first model runner"
        else:
            return True
        logger.warning(_SLOWER, reason)
        return False

    def score_in(self, engine: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
        """Have the worker of an `LLMEngine` send the rows of scored requests, or log why not."""
        if "worker_extension_cls" not in self.engine_args:
            return
        config = engine.vllm_config
        num_tokens = config.scheduler_config.max_num_batched_tokens
        longest = config.model_config.max_model_len
        if longest + _SCORING_STEPS * num_tokens > self._capacity:
            reasons = [
                f"the ring of {self._capacity} rows has no room for a trace of {longest} and "
                f"steps of {num_tokens} tokens"
            ]
        else:
            reasons = [each for each in engine.collective_rpc("take_scored_rows") if each]
        self.are_scored = not reasons
        if reasons:
            only_scores = "logits_processors" not in self.engine_args
            level = logging.WARNING if only_scores else logging.INFO
            logger.log(level, _SCORED_SLOWER, reasons[0])

    def set_room(self, num_requests: int, num_tokens: int) -> None:
        """Make room for so many requests in flight, of at most so many drawn tokens."""
        self._slots = list(range(num_requests))
        self._pages = RowPages(num_requests, num_tokens, self._ring.row_words)

    def begin(self, num_prompt: int) -> tuple[int, dict[str, list[int]]]:
        """The slot of a new request that draws tokens, and its `SamplingParams.extra_args`."""
        return self._begin(REQUEST_KEY, num_prompt)

    def begin_scoring(self, first_row: int) -> tuple[int, dict[str, list[int]]]:
        """The same of a request that is scored from this token on."""
        return self._begin(SCORED_KEY, first_row)

    def _begin(self, key: str, number: int) -> tuple[int, dict[str, list[int]]]:
        slot, serial = self._slots.pop(), next(self._serials)
        self._pages.open(slot, serial)
        return slot, {key: [slot, serial, number]}

    def drain(self) -> None:
        """Take what the worker has written."""
        for rows in self._ring.read():
            self._pages.add(rows)

    def rows(
        self, slot: int, num_rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]] | None:
        """Ids and logprobs [R, 1 + K], and logarithms of the mass outside the K candidates [R].

        None if some of these rows have not arrived.
        """
        rows = self._pages.rows(slot, num_rows)
        if rows is None:
            return None
        middle = HEAD_WORDS + 1 + self._num_candidates
        ids = np.ascontiguousarray(rows[:, HEAD_WORDS:middle])
        logprobs = np.ascontiguousarray(rows[:, middle:]).view(np.float32)
        return ids, logprobs, np.ascontiguousarray(rows[:, HEAD_WORDS - 1]).view(np.float32)

    def end(self, slot: int) -> None:
        """Forget a request, which has all of its rows or was given up."""
        self._pages.close(slot)
        self._slots.append(slot)

    def close(self) -> None:
        """Give up the ring; the worker ends if it waits for room."""
        self._ring.close()


def worker_rows_of(
    args: Mapping[str, Any],
    sampling: Sampling | None,
    num_candidates: int,
    *,
    longest: int | None = None,
) -> WorkerRows | None:
    """The ring for an engine that is to be started; None if its worker cannot give rows.

    Args:
        args: Its arguments.
        sampling: Settings for drawing tokens; None for an engine that only scores.
        num_candidates: K.
        longest: Tokens of the longest trace, if known.
    """
    reason = _why_not(args, sampling)
    if reason is not None:
        logger.info(_SLOWER, reason)
        return None
    loading: dict[str, Any] = {} if sampling is None else {"logits_processors": [PROCESSOR]}
    if args.get("worker_extension_cls"):
        logger.info(_SCORED_SLOWER, "worker_extension_cls is set already")
    else:
        loading["worker_extension_cls"] = EXTENSION
    if not loading:
        return None
    return WorkerRows(
        num_candidates=num_candidates,
        max_num_seqs=int(args["max_num_seqs"]),
        engine_args=loading,
        longest=longest or 0,
    )


def _why_not(args: Mapping[str, Any], sampling: Sampling | None) -> str | None:
    """Reason why an engine with these arguments cannot take rows in its worker; None if it may.

    Args:
        args: Arguments of `vllm.EngineArgs`.
        sampling: Settings for drawing tokens; None for an engine that only scores.
    """
    if sampling is not None and sampling.repetition_penalty != 1.0:
        return "a repetition penalty may change the logits before"
    for name in ("speculative_config", "spec_method", "spec_model", "spec_tokens"):
        if args.get(name) is not None:
            return "speculative decoding"
    for name in ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size"):
        if int(args.get(name) or 1) > 1:
            return name
    if args.get("enable_batch_sharded_sampling"):
        return "enable_batch_sharded_sampling"
    backend = args.get("distributed_executor_backend")
    return None if backend in _ONE_MACHINE else f"distributed_executor_backend {backend}"


def require_same_rows(
    what: str,
    ours: tuple[NDArray[np.int32], NDArray[np.float32]],
    stock: tuple[NDArray[np.int32], NDArray[np.float32]],
    tolerance: float,
) -> None:
    """Compare rows from the worker with vLLM's own logprobs of the same tokens.

    Args:
        what: Whose rows these are, for the message.
        ours: Ids and logprobs, [R, 1 + K].
        stock: The same from vLLM's logprobs.
        tolerance: Nats by which logprobs may differ; ids of candidates that are closer to each
            other than twice that may have another order.

    Raises:
        EngineError: If they differ.
    """
    (ids, logprobs), (stock_ids, stock_logprobs) = ours, stock
    if ids.shape != stock_ids.shape:
        raise EngineError(f"{what}: expected rows {stock_ids.shape} from the worker, {ids.shape}")
    with np.errstate(invalid="ignore"):  # -inf on both sides
        difference = np.abs(logprobs - stock_logprobs)
        close = ~(stock_logprobs[:, 1:-1] - stock_logprobs[:, 2:] > 2 * tolerance)
    difference[logprobs == stock_logprobs] = 0
    is_clear = np.ones(ids.shape, bool)
    is_clear[:, 1:-1] &= ~close
    is_clear[:, 2:] &= ~close
    is_clear[:, -1] = False  # the next candidate is not known
    is_wrong = ~(difference <= tolerance) | (is_clear & (ids != stock_ids))
    if is_wrong.any():
        row, column = np.argwhere(is_wrong)[0]
        raise EngineError(
            f"{what}: row {row} taken in vLLM's worker differs from vLLM's own logprobs: "
            f"id {ids[row, column]} with {logprobs[row, column]:.6f} in place of "
            f"{stock_ids[row, column]} with {stock_logprobs[row, column]:.6f} nats; "
            "capture with --rows-from logprobs"
        )


def require_same_tails(
    what: str,
    log_tails: NDArray[np.float32],
    stock_logprobs: NDArray[np.float32],
    vocab_size: int,
) -> None:
    """Compare tails from the worker with what vLLM's own logprobs leave.

    Args:
        what: Whose rows these are, for the message.
        log_tails: Logarithms of the mass outside the K candidates, [R].
        stock_logprobs: vLLM's logprobs of the same tokens, [R, 1 + K].
        vocab_size: V, whose sum in float32 by vLLM is off by up to 0.7e-9 V on a CPU: 3.4e-5 for
            SmolLM2's 49,152, where our tails were within 2e-6 of float64.

    Raises:
        EngineError: If they differ.
    """
    tolerance = max(_TAIL_TOLERANCE, _TAIL_TOLERANCE_PER_ID * vocab_size)
    left = 1 - np.exp(stock_logprobs[:, 1:].astype(np.float64)).sum(axis=1)
    difference = np.abs(np.exp(log_tails.astype(np.float64)) - left)
    if not (difference <= tolerance).all():
        row = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
        raise EngineError(
            f"{what}: the mass outside the candidates of row {row}, summed in vLLM's worker, "
            f"differs by {difference[row]:.2g} from what vLLM's own logprobs leave; capture with "
            "--rows-from logprobs"
        )
