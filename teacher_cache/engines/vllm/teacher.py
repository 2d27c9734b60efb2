"""`VllmTeacher`: a bounded window of requests in flight, yielding rows as they finish.

Letters: R rows (tokens with a distribution), K kept candidates per row.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from teacher_cache.engines import (
    EngineDiedError,
    EngineError,
    Sampling,
    TeacherFacts,
    TeacherRequest,
    TeacherRows,
)
from teacher_cache.engines.checks import check_model, check_request
from teacher_cache.engines.vllm.kv_room import KvRoom
from teacher_cache.engines.vllm.processes import EngineProcesses
from teacher_cache.engines.vllm.requests import Flight, check_of, finished_rows, sampling_params
from teacher_cache.engines.vllm.rows import tap, why_untapped
from teacher_cache.engines.vllm.settings import reported_settings
from teacher_cache.engines.vllm.shared_prompts import SharedPrompts, is_too_far
from teacher_cache.engines.vllm.start import (
    args_with_defaults,
    check_engine_args,
    end_engine,
    imported_vllm,
    installed_version,
    rows_args,
    start_engine,
)
from teacher_cache.engines.vllm.worker_rows import (
    NO_SLOT,
    REQUEST_KEY,
    worker_rows_of,
)

logger = logging.getLogger(__name__)

# One request in so many is run once more, with vLLM's own logprobs beside the worker's rows.
_CHECK_EVERY = 1000
_MOST_STEPS = 100  # of an engine that has finished a request, until its last row has arrived


class VllmTeacher:
    """A model run by vLLM as a `Teacher`: a bounded window of requests in flight.

    The engine lives in processes of its own, which `close` ends. They are spawned on every
    platform: a script that makes a teacher needs `if __name__ == "__main__":`. Missing environment
    variables of vLLM are set for this process and those; variables that are set already are left
    alone.

    Args:
        model: Folder, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "bfloat16" or
            "float16".
        top_k: Candidates per row (K), at most the vocabulary.
        max_model_len: Tokens in the longest trace, prompt included; the model's own limit if
            that is lower, or if this is None. vLLM needs room for one more token to score a
            trace, which the model's own limit does not leave.
        sampling: Settings for drawing new tokens; None for an engine that only scores.
        window: Requests in flight; None for 1.5 times vLLM's `max_num_seqs`.
        engine_args: Further arguments of `vllm.EngineArgs`, by name.
        rows_from: "worker" takes rows from the logits in vLLM's worker, where the engine's
            settings allow it; "logprobs" from the logprobs that vLLM returns.
        trust_remote_code: Whether code that comes with the model may run.
        head_dtype: Of the logits; "model" for the model's own, which a quantised head needs.
            `hf_overrides` in `engine_args` takes precedence.

    Raises:
        EngineError: If vLLM is missing or too old, an engine argument unknown or reserved, or the
            engine does not start.
    """

    facts: TeacherFacts

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        top_k: int,
        max_model_len: int | None = None,
        sampling: Sampling | None = None,
        window: int | None = None,
        engine_args: Mapping[str, object] | None = None,
        rows_from: str = "worker",
        trust_remote_code: bool = False,
        head_dtype: str = "float32",
    ) -> None:
        version, is_cpu_build = installed_version()
        check_model(model, revision)
        vllm, on_cpu = imported_vllm(version, is_cpu_build)
        known = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
        check_engine_args(known, engine_args or {})
        args = args_with_defaults(engine_args or {}, on_cpu=on_cpu)
        args = rows_args(args, top_k, head_dtype=head_dtype, on_cpu=on_cpu)
        args |= {
            "model": model,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        }
        self._top_k = top_k
        self._sampling = sampling
        self._worker_rows = None
        if rows_from == "worker":
            self._worker_rows = worker_rows_of(args, sampling, top_k, longest=max_model_len)
        self._processes = EngineProcesses()
        try:
            with self._processes.starting(), contextlib.ExitStack() as stack:
                if self._worker_rows is not None:
                    args |= self._worker_rows.engine_args
                    stack.enter_context(self._worker_rows.offered())
                self._engine = start_engine(
                    vllm, args, max_model_len, on_cpu=on_cpu, seeded=sampling is not None
                )
                if self._worker_rows is not None:
                    self._worker_rows.score_in(self._engine)
        except BaseException:
            self._processes.close()
            self._close_worker_rows()
            raise
        self._processes.report_death(self._engine)
        self._is_at_work = False
        config = self._engine.vllm_config
        self._context = config.model_config.max_model_len
        self.facts = TeacherFacts(
            engine="vllm",
            engine_version=version,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            head_dtype=str(config.model_config.head_dtype).removeprefix("torch."),
            vocab_size=config.model_config.get_vocab_size(),
            max_model_len=min(max_model_len or self._context, self._context),
            settings=reported_settings(config),
        )
        self._is_tapped = True
        if (reason := why_untapped()) is not None:
            self._leave_untapped(reason)
        self._window = window or max(1, config.scheduler_config.max_num_seqs * 3 // 2)
        self._serial = itertools.count()
        self._num_in_worker = itertools.count()
        self._num_steps = 0
        self._kv_room = KvRoom(config)
        self._shared_prompts = SharedPrompts(config.cache_config.block_size)
        if self._worker_rows is not None:
            if self._worker_rows.are_sent(config):
                self._worker_rows.set_room(self._window + 1, self._context)  # and a check
            else:
                self._close_worker_rows()

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request; traces are yielded as they finish. One run at a time.

        Raises:
            EngineError: If a request is refused or fails, or the engine dies (EngineDiedError).
                Requests in flight are abandoned.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        source = iter(requests)
        flights: dict[str, Flight] = {}
        # Outputs of those that the engine has finished, and the step at which it had.
        landed: dict[str, tuple[Any, int]] = {}
        self._is_at_work = True
        try:
            while True:
                num_asked = sum(not flight.is_check for flight in flights.values())
                for request in itertools.islice(source, self._window - num_asked):
                    self._submit(request, flights)
                if not flights:
                    self._is_at_work = False
                    return
                self._step(flights, landed)
                for name in list(landed):
                    rows = finished_rows(
                        flights[name], landed[name][0], self._top_k, self._worker_rows,
                        self.facts.vocab_size,
                    )  # fmt: skip
                    if rows is None:
                        continue
                    del landed[name]
                    flight = self._forget(flights.pop(name))
                    if flight.is_check:
                        continue
                    if flight.request.max_new_tokens:
                        self._kv_room.note(len(rows.token_ids))
                    yield rows
        except EngineDeadError as error:
            flights.clear()
            raise EngineDiedError("the vLLM engine died") from error
        finally:
            for flight in flights.values():
                self._forget(flight)
            if flights:
                self._engine.abort_request([name for name in flights if name not in landed])

    def _forget(self, flight: Flight) -> Flight:
        if flight.slot is not None and self._worker_rows is not None:
            self._worker_rows.end(flight.slot)
        return flight

    def _step(self, flights: dict[str, Flight], landed: dict[str, tuple[Any, int]]) -> None:
        """Let the engine step, and take what it finished.

        The worker writes a row one step later: once the engine has nothing more to do, it gets a
        request whose answer nobody wants.
        """
        self._num_steps += 1
        for name, (_, step) in landed.items():
            if self._num_steps - step > _MOST_STEPS:
                raise EngineError(
                    f"request {flights[name].request.request_id!r}: vLLM's worker did not send all "
                    "of its rows; capture with --rows-from logprobs"
                )
        if len(landed) == len(flights) and not self._engine.has_unfinished_requests():
            nothing = TeacherRequest("", (0,), 1, 0, capture_prompt=False)
            tag = {REQUEST_KEY: [NO_SLOT, 0, 1]}
            self._add(f"step-{next(self._serial)}", nothing, tag, with_logprobs=False)
        for output in self._engine.step():
            if not output.finished or output.request_id not in flights:
                continue
            flight = flights[output.request_id]
            if flight.reads_cache and is_too_far(flight.request, output.num_cached_tokens):
                self._forget(flights.pop(output.request_id))
                self._score(flight.request, flights, may_read_cache=False)
            else:
                landed[output.request_id] = output, self._num_steps
        if self._worker_rows is not None:
            self._worker_rows.drain()

    def close(self) -> None:
        """End the engine's processes."""
        self._close_worker_rows()
        end_engine(self._engine, is_at_work=self._is_at_work)
        self._processes.close()

    def _close_worker_rows(self) -> None:
        if self._worker_rows is not None:
            self._worker_rows.close()
            self._worker_rows = None

    def _submit(self, request: TeacherRequest, flights: dict[str, Flight]) -> None:
        """Hand a request to the engine, under a unique name of our own."""
        scoring = request.max_new_tokens == 0
        check_request(
            request,
            vocab_size=self.facts.vocab_size,
            # A trace is scored as the prompt of one generated token, which is discarded.
            max_model_len=min(self.facts.max_model_len, self._context - scoring),
            sampling=self._sampling,
        )
        name = str(next(self._serial))
        rows = self._worker_rows
        if rows is None or (scoring and not rows.are_scored):
            self._add(name, request, None, with_logprobs=True)
            flights[name] = Flight(request)
            return
        is_due = next(self._num_in_worker) % _CHECK_EVERY == 0
        if scoring:
            # The head runs twice then, on other shapes: rounded logits would differ by a step.
            is_due &= self.facts.head_dtype == "float32"
            may_read_cache = self._shared_prompts.may_read(request) and not is_due
            self._score(request, flights, may_read_cache=may_read_cache, is_compared=is_due)
            return
        slot, tag = rows.begin(len(request.token_ids))
        self._add(name, request, tag, with_logprobs=False)
        flights[name] = Flight(request, slot)
        if is_due and not any(flight.is_check for flight in flights.values()):
            slot, tag = rows.begin(len(request.token_ids))
            check = check_of(request)
            self._add(f"check-{name}", check, tag, with_logprobs=True)
            flights[f"check-{name}"] = Flight(check, slot, is_check=True, is_compared=True)

    def _score(
        self,
        request: TeacherRequest,
        flights: dict[str, Flight],
        *,
        may_read_cache: bool,
        is_compared: bool = False,
    ) -> None:
        """Score a trace by rows from the worker; to be compared, the same request has both."""
        if self._worker_rows is None:
            raise EngineError(f"request {request.request_id!r}: the worker sends no rows")
        name = str(next(self._serial))
        slot, tag = self._worker_rows.begin_scoring(request.first_row)
        self._add(name, request, tag, with_logprobs=is_compared, may_read_cache=may_read_cache)
        flights[name] = Flight(request, slot, is_compared=is_compared, reads_cache=may_read_cache)

    def _add(
        self,
        name: str,
        request: TeacherRequest,
        tag: Mapping[str, list[int]] | None,
        *,
        with_logprobs: bool,
        may_read_cache: bool = False,
    ) -> None:
        from vllm.inputs import tokens_input

        room = self.facts.max_model_len - len(request.token_ids)
        params = sampling_params(
            request, self._sampling, room, self._top_k, tag,
            with_logprobs=with_logprobs, may_read_cache=may_read_cache,
        )  # fmt: skip
        internal = self._engine.add_request(name, tokens_input(list(request.token_ids)), params)
        if self._is_tapped:
            try:
                state = self._engine.output_processor.request_states[internal]
                tap(state.logprobs_processor, self._top_k)
            except (AttributeError, LookupError, TypeError) as error:
                self._leave_untapped(repr(error))

    def _leave_untapped(self, reason: str) -> None:
        self._is_tapped = False
        logger.warning(
            "vLLM %s gives no access to its arrays (%s): reading FlatLogprobs, which costs more "
            "of this process's time and memory, with the same result",
            self.facts.engine_version,
            reason,
        )
