"""Starts an engine by name; each engine is imported only when requested."""

from collections.abc import Mapping

from teacher_cache.engines import EngineError, Sampling, Teacher
from teacher_cache.engines.server.settings import ServerSettings

LOCAL_ENGINES = ("vllm", "transformers")  # those that load the model
ENGINES = (*LOCAL_ENGINES, "server")
ROWS_FROM = ("worker", "logprobs")  # where vLLM's rows are taken
DTYPES = ("auto", "bfloat16", "float16", "float32")

# vLLM's own words, with which its process ends.
_HEAD_IS_QUANTISED = "only supported for an unquantized lm_head"


def is_of_quantised_head(cause: str) -> bool:
    """Whether an engine did not start because its model's head cannot have float32 logits."""
    return _HEAD_IS_QUANTISED in cause


def check_engine_args_early(engine: str, engine_args: Mapping[str, object]) -> None:
    """Refuse arguments that the engine does not know, without importing it.

    Raises:
        EngineError: Names the argument, and similar names.
    """
    if engine == "vllm" and engine_args:
        from teacher_cache.engines.vllm.start import check_engine_args, engine_args_in_source

        check_engine_args(engine_args_in_source(), engine_args)


def start_teacher(
    engine: str,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    top_k: int,
    max_model_len: int,
    sampling: Sampling | None,
    engine_args: Mapping[str, object],
    rows_from: str,
    trust_remote_code: bool = False,
    server: ServerSettings | None = None,
    head_dtype: str = "float32",
) -> Teacher:
    """Start an engine.

    `engine_args`, `rows_from` and `head_dtype` are for vLLM only, `server` is for a server.

    Raises:
        EngineError: If it cannot be started.
    """
    if engine == "server":
        from teacher_cache.engines.server.teacher import ServerTeacher

        if server is None:
            raise EngineError("engine server: expected the server's settings, got none")
        return ServerTeacher(server, top_k=top_k, max_model_len=max_model_len, sampling=sampling)
    if engine == "transformers":
        from teacher_cache.engines.transformers import TransformersTeacher

        return TransformersTeacher(
            model=model,
            revision=revision,
            dtype=dtype,
            top_k=top_k,
            max_model_len=max_model_len,
            sampling=sampling,
            trust_remote_code=trust_remote_code,
        )
    from teacher_cache.engines.vllm import VllmTeacher

    return VllmTeacher(
        model=model,
        revision=revision,
        dtype=dtype,
        top_k=top_k,
        max_model_len=max_model_len,
        sampling=sampling,
        engine_args=engine_args,
        rows_from=rows_from,
        trust_remote_code=trust_remote_code,
        head_dtype=head_dtype,
    )
