"""`VllmTeacher`: a bounded window of requests in flight, yielding rows as they finish.

Letters: R rows (tokens with a distribution), K kept candidates per row.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from teacher_cache.engines import (
    EngineDiedError,
    EngineError,
    Sampling,
    TeacherFacts,
    TeacherRequest,
    TeacherRows,
)
from teacher_cache.engines.checks import check_model, check_request, check_rows
from teacher_cache.engines.vllm.processes import EngineProcesses
from teacher_cache.engines.vllm.rows import tap, to_rows, why_untapped
from teacher_cache.engines.vllm.settings import reported_settings
from teacher_cache.engines.vllm.start import (
    check_engine_args,
    default_args,
    installed_version,
    require_spawn,
    set_environment,
    start_engine,
)

logger = logging.getLogger(__name__)

# Time for the engine's processes to end before they are killed. They need 4 s on a CPU.
_CLOSING_S = 30.0
_BREAKING_OFF_S = 0.3  # when its answers are no longer wanted


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
            "float16". The logits are always float32, unless `hf_overrides` in `engine_args`
            sets another `head_dtype` (needed if the head itself is quantised).
        top_k: Candidates per row (K), at most the vocabulary.
        max_model_len: Tokens in the longest trace, prompt included; the model's own limit if
            that is lower, or if this is None. vLLM needs room for one more token to score a
            trace, which the model's own limit does not leave.
        sampling: Settings for drawing new tokens; None for an engine that only scores.
        window: Requests in flight; None for 1.5 times vLLM's `max_num_seqs`.
        engine_args: Further arguments of `vllm.EngineArgs`, by name.
        trust_remote_code: Whether code that comes with the model may run.

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
        trust_remote_code: bool = False,
    ) -> None:
        version, is_cpu_build = installed_version()
        check_model(model, revision)
        set_environment(
            VLLM_LOGGING_STREAM="ext://sys.stderr",  # stdout carries results
            # The CPU build warns at length about missing features.
            VLLM_LOGGING_LEVEL="ERROR" if is_cpu_build else "WARNING",
            # One message per step instead of two more frames per request: half the transport cost.
            VLLM_MSGPACK_ZERO_COPY_THRESHOLD=str(1 << 20),
            OMP_WAIT_POLICY="passive",  # threads of the engine that wait leave us their cores
        )
        require_spawn()
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_unspecified():
            raise EngineError(
                f"vLLM {version} is built for a GPU and finds none; "
                "on a machine without one install the CPU build, in a checkout of leadspan: "
                "pip install '.[cpu]'"
            )
        known = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
        check_engine_args(known, engine_args or {})
        on_cpu = current_platform.is_cpu()
        args = default_args(on_cpu) | dict(engine_args or {})
        args |= {
            "model": model,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": top_k,
            "hf_overrides": {"head_dtype": "float32"} | dict(args.get("hf_overrides") or {}),
        }
        if on_cpu and args["enforce_eager"]:
            # Eager vLLM still compiles the token-ranking kernel: seconds, and a C++ compiler.
            set_environment(TORCH_COMPILE_DISABLE="1")
        self._processes = EngineProcesses()
        try:
            with self._processes.starting():
                self._engine = start_engine(
                    vllm, args, max_model_len, on_cpu=on_cpu, seeded=sampling is not None
                )
        except BaseException:
            self._processes.close()
            raise
        self._processes.report_death(self._engine)
        self._is_at_work = False
        self._sampling = sampling
        self._top_k = top_k
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

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request; traces are yielded as they finish. One run at a time.

        Raises:
            EngineError: If a request is refused or fails, or the engine dies (EngineDiedError).
                Requests in flight are abandoned.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        source = iter(requests)
        in_flight: dict[str, TeacherRequest] = {}
        self._is_at_work = True
        try:
            while True:
                for request in itertools.islice(source, self._window - len(in_flight)):
                    in_flight[self._submit(request)] = request
                if not in_flight:
                    self._is_at_work = False
                    return
                for output in self._engine.step():
                    if output.finished:
                        yield self._finished(in_flight.pop(output.request_id), output)
        except EngineDeadError as error:
            in_flight.clear()
            raise EngineDiedError("the vLLM engine died") from error
        finally:
            if in_flight:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """End the engine's processes."""
        core = self._engine.engine_core
        core.shutdown(timeout=_BREAKING_OFF_S if self._is_at_work else _CLOSING_S)
        self._engine.renderer.shutdown()
        # vLLM leaves its sockets to the garbage collector; a thread still reading keeps them.
        reader, context = (getattr(core, name, None) for name in ("output_queue_thread", "ctx"))
        if reader is not None and context is not None:
            reader.join(_CLOSING_S)
            if not reader.is_alive():
                context.destroy(linger=0)
        self._processes.close()

    def _submit(self, request: TeacherRequest) -> str:
        """Hand a request to the engine, under a unique name of our own."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        scoring = request.max_new_tokens == 0
        check_request(
            request,
            vocab_size=self.facts.vocab_size,
            # A trace is scored as the prompt of one generated token, which is discarded.
            max_model_len=min(self.facts.max_model_len, self._context - scoring),
            sampling=self._sampling,
        )
        drawing = self._sampling
        if scoring or drawing is None:
            drawing = Sampling(temperature=0.0, top_p=1.0, top_k=0)
        room = self.facts.max_model_len - len(request.token_ids)
        params = SamplingParams(
            n=1,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k,
            min_p=drawing.min_p,
            repetition_penalty=drawing.repetition_penalty,
            stop_token_ids=list(drawing.stop_ids),
            seed=request.seed,
            max_tokens=1 if scoring else min(request.max_new_tokens, room),
            logprobs=None if scoring else self._top_k,
            prompt_logprobs=self._top_k if scoring or request.capture_prompt else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(next(self._serial))
        internal = self._engine.add_request(name, tokens_input(list(request.token_ids)), params)
        if self._is_tapped:
            try:
                state = self._engine.output_processor.request_states[internal]
                tap(state.logprobs_processor, self._top_k)
            except (AttributeError, LookupError, TypeError) as error:
                self._leave_untapped(repr(error))
        return name

    def _leave_untapped(self, reason: str) -> None:
        self._is_tapped = False
        logger.warning(
            "vLLM %s gives no access to its arrays (%s): reading FlatLogprobs, which costs more "
            "of this process's time and memory, with the same result",
            self.facts.engine_version,
            reason,
        )

    def _finished(self, request: TeacherRequest, output: Any) -> TeacherRows:  # noqa: ANN401 (vLLM is untyped here)
        """The rows of one finished request."""
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"request {request.request_id!r}: vLLM ended it as {completion.finish_reason!r}"
            )
        scoring = request.max_new_tokens == 0
        generated = [] if scoring else list(completion.token_ids)
        capture_given = scoring or request.capture_prompt
        results = [output.prompt_logprobs] if capture_given else []
        results += [] if scoring else [completion.logprobs]
        pieces = [to_rows(request.request_id, each, self._top_k) for each in results]
        rows = TeacherRows(
            request_id=request.request_id,
            token_ids=np.array([*request.token_ids, *generated], dtype=np.int32),
            num_given=len(request.token_ids),
            first_row=1 if capture_given else len(request.token_ids),
            row_ids=np.concatenate([ids for ids, _ in pieces]),
            row_logprobs=np.concatenate([logprobs for _, logprobs in pieces]),
            finish_reason="scored" if scoring else completion.finish_reason,
        )
        check_rows(rows)
        return rows
