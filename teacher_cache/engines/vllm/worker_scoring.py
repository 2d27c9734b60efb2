"""A worker extension of vLLM for scoring: rows of given tokens without prompt logprobs.

vLLM computes the logprobs of every token of a prompt, their ranks too, and sends them through its
scheduler. Here only the wanted rows pass through the head, and take the way of drawn tokens' rows.

No public hook of vLLM sees a prompt's hidden states, so that a method is wrapped that does: of the
first model runner (`_get_prompt_logprobs_dict`) or of the second's `prompt_logprobs_worker`. Names
and signatures are compared first; where they differ, prompts keep their logprobs.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.engines.vllm.step_rows import Outbox, RowMaker
from teacher_cache.engines.vllm.worker_rows import SCORED_KEY
from teacher_cache.engines.vllm.worker_tap import opened_ring

# Tokens whose logits exist at a time, twice on a GPU: vLLM itself takes 1024, once.
_CHUNK_ON_DEVICE = 512
_CHUNK_ON_HOST = 256

_LogitsOf = Callable[[torch.Tensor], torch.Tensor | None]
_FIRST_RUNNERS = ("hidden_states", "num_scheduled_tokens")
_SECOND_RUNNERS = (
    "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens",
    "prompt_lens",
)  # fmt: skip


class ScoringExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`; called by `collective_rpc`."""

    model_runner: Any

    def take_scored_rows(self) -> str | None:
        """From now on send the rows of requests with `SCORED_KEY`.

        Returns:
            Reason why this worker cannot; None if it does.
        """
        runner = self.model_runner
        try:
            if hasattr(runner, "prompt_logprobs_worker"):
                _wrap_second(runner.prompt_logprobs_worker)
            else:
                _wrap_first(runner)
        except (AttributeError, TypeError, ValueError) as error:  # another version's insides
            return repr(error)
        return None


@dataclass(frozen=True)
class _Part:
    """The part of a request's tokens that a step computes."""

    tag: tuple[int, int, int]  # slot, serial, first token with a row
    start: int  # position of the first token computed
    num_tokens: int
    num_prompt: int
    offset: int  # of the first token computed among the step's hidden states
    tokens: Callable[[int, int], torch.Tensor]  # the prompt's own from one position to another


class _ScoredRows:
    """Rows from the hidden states of one step after the other."""

    def __init__(self) -> None:
        self._outbox = Outbox(opened_ring())
        self._maker = RowMaker()

    def take(self, logits_of: _LogitsOf, hidden_states: torch.Tensor, parts: list[_Part]) -> None:
        """Send the wanted rows of a step; every rank calls this alike, for the head is shared."""
        self._outbox.send()
        places, heads, tokens = [], [], []
        for part in parts:
            slot, serial, first = part.tag
            # The hidden state of a token gives the row of the next one; the last is not asked for.
            low = max(part.start, first - 1)
            high = min(part.start + part.num_tokens, part.num_prompt - 1)
            if low >= high:
                continue
            positions = np.arange(low, high)
            places.append(positions + (part.offset - part.start))
            heads.append(_heads(slot, serial, positions + 1 - first))
            tokens.append(part.tokens(low + 1, high + 1))
        if places:
            self._send(
                logits_of,
                hidden_states,
                np.concatenate(places),
                np.concatenate(heads),
                torch.cat(tokens),
            )

    def _send(
        self,
        logits_of: _LogitsOf,
        hidden_states: torch.Tensor,
        places: NDArray[np.int64],
        heads: NDArray[np.int32],
        tokens: torch.Tensor,
    ) -> None:
        size = _CHUNK_ON_HOST if hidden_states.device.type == "cpu" else _CHUNK_ON_DEVICE
        where = torch.from_numpy(places).to(hidden_states.device)
        for begin in range(0, len(places), size):
            part = slice(begin, begin + size)
            logits = logits_of(hidden_states[where[part]])
            ring = self._outbox.ring
            if ring is None or logits is None:  # another rank's
                continue
            drawn = partial(tokens.__getitem__, part)
            step = self._maker.started(heads[part], logits.float(), drawn, ring.num_candidates)
            self._outbox.add(step.rows())


def _heads(slot: int, serial: int, positions: NDArray[np.int64]) -> NDArray[np.int32]:
    columns = (np.full(len(positions), slot), np.full(len(positions), serial), positions)
    return np.column_stack(columns).astype(np.int32)


def _require_parameters(method: Callable[..., Any], expected: Iterable[str]) -> None:
    found = tuple(inspect.signature(method).parameters)
    if found != tuple(expected):
        raise TypeError(f"{method.__qualname__} takes {', '.join(found)}")


def _tag_of(sampling_params: Any) -> tuple[int, int, int] | None:  # noqa: ANN401 (vLLM is untyped here)
    named = (getattr(sampling_params, "extra_args", None) or {}).get(SCORED_KEY)
    return None if named is None else tuple(named)


def _wrap_first(runner: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
    stock = runner._get_prompt_logprobs_dict
    _require_parameters(stock, _FIRST_RUNNERS)
    requests, batch, starts = runner.requests, runner.input_batch, runner.query_start_loc.np
    _ = batch.req_id_to_index, starts.shape, requests.items, runner.model.compute_logits
    scored = _ScoredRows()

    def wrapped(hidden_states: torch.Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:  # noqa: ANN401 (as vLLM's)
        parts = []
        for name, num_tokens in num_scheduled_tokens.items():
            request = runner.requests[name]
            tag = _tag_of(request.sampling_params)
            if tag is None:
                continue
            ids = request.prompt_token_ids

            def tokens(low: int, high: int, ids: Any = ids) -> torch.Tensor:  # noqa: ANN401 (a list)
                return torch.tensor(ids[low:high], device=hidden_states.device)

            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
            parts.append(
                _Part(tag, request.num_computed_tokens, num_tokens, len(ids), offset, tokens)
            )
        scored.take(runner.model.compute_logits, hidden_states, parts)
        return stock(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = wrapped


def _wrap_second(worker: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
    add, remove, stock = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    _require_parameters(add, ("req_id", "req_idx", "sampling_params"))
    _require_parameters(remove, ("req_id",))
    _require_parameters(stock, _SECOND_RUNNERS)
    scored, tags = _ScoredRows(), dict[str, tuple[int, int, int]]()

    def add_request(req_id: str, req_idx: int, sampling_params: Any) -> None:  # noqa: ANN401 (vLLM's)
        tag = _tag_of(sampling_params)
        if tag is not None:
            tags[req_id] = tag
        add(req_id, req_idx, sampling_params)

    def remove_request(req_id: str) -> None:
        tags.pop(req_id, None)
        remove(req_id)

    def wrapped(
        logits_fn: _LogitsOf,
        hidden_states: torch.Tensor,
        input_batch: Any,  # noqa: ANN401 (vLLM is untyped here)
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: NDArray[np.int32],
    ) -> Any:  # noqa: ANN401 (as vLLM's)
        parts = []
        for number, name in enumerate(input_batch.req_ids if tags else ()):
            if name not in tags:
                continue
            place = int(input_batch.idx_mapping_np[number])

            def tokens(low: int, high: int, place: int = place) -> torch.Tensor:
                return all_token_ids[place, low:high].long()

            parts.append(
                _Part(
                    tags[name],
                    int(input_batch.num_computed_prefill_tokens_np[number]),
                    int(input_batch.num_scheduled_tokens[number]),
                    int(prompt_lens[place]),
                    int(input_batch.query_start_loc_np[number]),
                    tokens,
                )
            )
        scored.take(logits_fn, hidden_states, parts)
        return stock(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )

    worker.add_request, worker.remove_request = add_request, remove_request
    worker.compute_prompt_logprobs = wrapped
