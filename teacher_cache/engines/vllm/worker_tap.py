"""A logits processor of vLLM that changes nothing: it keeps each row's top-k and its exact tail.

vLLM loads it into its worker (`logits_processors`, its own extension point), where the float32
logits are still whole and untouched by temperature and cut-offs. Requests then need no logprobs,
whose way through scheduler, messages and front end costs more than a small model's forward pass.

vLLM has two interfaces for these, one per model runner; `RowTap` has both.

Letters: B rows of a step's batch, V vocabulary, n rows that are kept, K candidates per row.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from teacher_cache.engines.vllm.ring import RowRing
from teacher_cache.engines.vllm.step_rows import Outbox, RowMaker, Step
from teacher_cache.engines.vllm.worker_rows import NO_SLOT, REQUEST_KEY, RING_VARIABLE

try:  # of the second model runner, which older versions lack
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsProcessor as SecondRunnersProcessor,
    )
except ImportError:
    SecondRunnersProcessor = object  # nothing to inherit


# Slot, serial and position [n, 3], logits [n, V], and what reads the drawn tokens later.
_Rows = tuple[NDArray[np.int32], torch.Tensor, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class _Request:
    slot: int
    serial: int
    num_prompt: int
    output: Sequence[int]  # the first model runner's list, which grows; empty with the second


class RowTap(LogitsProcessor, SecondRunnersProcessor):  # type: ignore[misc]  # two interfaces
    """Writes a row for every token that a request with `REQUEST_KEY` draws.

    A row is written in the step after its own, when its token is known. The last row of a request
    therefore needs one more step of the engine, whosever it is.
    """

    def __init__(self, vllm_config: Any, *runner: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
        """Open the ring, in the worker whose rows count; elsewhere do nothing.

        Args:
            vllm_config: Unused.
            runner: `device, is_pin_memory` of the first model runner, or the request states of the
                second.
        """
        self._ring = opened_ring()
        self._outbox = Outbox(self._ring)
        self._requests: dict[int, _Request] = {}  # by their place in the runner's batch
        self._maker = RowMaker()
        self._pending: Step | None = None
        self._states: Any = runner[0] if len(runner) == 1 else None

    def is_argmax_invariant(self) -> bool:
        """No: a processor that is would be called after the temperature is applied."""
        return False

    # --- the first model runner ---

    def update_state(self, batch_update: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
        """Follow requests through the batch's places."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._requests.pop(place, None)
        for place, params, _, output in batch_update.added:
            self._take(place, params, output)
        for one, other, direction in batch_update.moved:
            first, second = self._requests.pop(one, None), self._requests.pop(other, None)
            if first is not None:
                self._requests[other] = first
            if direction == MoveDirectionality.SWAP and second is not None:
                self._requests[one] = second

    def _rows_of_first_runner(self, logits: torch.Tensor) -> _Rows | None:
        places = sorted(self._requests)
        requests = [self._requests[place] for place in places]
        if not requests:
            return None
        positions = [len(request.output) for request in requests]
        heads = [(r.slot, r.serial, at) for r, at in zip(requests, positions, strict=True)]

        def drawn() -> torch.Tensor:
            # A prompt that is not complete draws no token.
            tokens = [
                r.output[at] if len(r.output) > at else -1
                for r, at in zip(requests, positions, strict=True)
            ]
            return torch.tensor(tokens, device=logits.device)

        rows = logits if len(places) == len(logits) else logits[places]
        return np.array(heads, np.int32), rows, drawn

    # --- the second model runner ---

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:  # noqa: ANN401 (vLLM is untyped here)
        """Note who has this place from now on; its last owner's token is read before."""
        self._finish_pending()
        return self._take(req_idx, sampling_params, ())

    def _rows_of_second_runner(self, logits: torch.Tensor, context: Any) -> _Rows | None:  # noqa: ANN401 (vLLM is untyped here)
        places, ends = context.idx_mapping_np, context.seq_lens_upper_bound_np
        found = [
            (row, place, end, request)
            for row, (place, end) in enumerate(zip(places.tolist(), ends.tolist(), strict=True))
            if (request := self._requests.get(place)) is not None and end >= request.num_prompt
        ]
        if not found:
            return None
        heads = [(r.slot, r.serial, end - r.num_prompt) for _, _, end, r in found]
        where = torch.tensor([(place, end) for _, place, end, _ in found], device=logits.device)
        all_token_ids = self._states.all_token_ids.gpu

        def drawn() -> torch.Tensor:
            tokens: torch.Tensor = all_token_ids[where[:, 0], where[:, 1]]
            return tokens.long()

        rows = logits if len(found) == len(logits) else logits[[row for row, *_ in found]]
        return np.array(heads, np.int32), rows, drawn

    # --- both ---

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:  # noqa: ANN401 (vLLM is untyped here)
        """Keep this step's rows, and write those of the one before."""
        if self._ring is None:
            return logits
        self._finish_pending()
        found = (
            self._rows_of_first_runner(logits)
            if context is None
            else self._rows_of_second_runner(logits, context)
        )
        if found is not None:
            self._pending = self._maker.started(*found, self._ring.num_candidates)
        return logits

    def _take(self, place: int, params: Any, output: Sequence[int]) -> bool:  # noqa: ANN401 (vLLM is untyped here)
        self._requests.pop(place, None)
        named = (params.extra_args or {}).get(REQUEST_KEY)
        if named is None:
            return False
        slot, serial, num_prompt = named
        if self._ring is not None and slot != NO_SLOT:
            self._requests[place] = _Request(slot, serial, num_prompt, output)
        # Or the second model runner would not call `apply`. All ranks say the same, so that all
        # draw from the same copy of the logits.
        return True

    def _finish_pending(self) -> None:
        if self._pending is not None:
            self._outbox.add(self._pending.rows())
            self._pending = None
        self._outbox.send()


def opened_ring() -> RowRing | None:
    """The ring of this engine's reader, in the one worker that writes."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    address = os.environ.get(RING_VARIABLE)
    if address is None or get_tp_group().rank_in_group != 0 or not get_pp_group().is_last_rank:
        return None
    try:
        return RowRing.opened(address)
    except OSError:  # another machine's: the reader sees that nobody writes, and does without
        return None
