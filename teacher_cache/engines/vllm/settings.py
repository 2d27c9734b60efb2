"""Settings that change a teacher's numbers, as a vLLM engine reports them.

The requested arguments do not show them: one may be ignored, defaulted, or set by the model's
own files. Two captures whose engines report the same may share a cache.
"""

from typing import Any

from teacher_cache.engines.checks import settings_hash

# Fields of vLLM's cache and model configuration, by their names in a header.
_OF_CACHE = {
    "kv_cache_dtype": "cache_dtype",
    "kv_cache_dtype_skip_layers": "kv_cache_dtype_skip_layers",
    "mamba_cache_dtype": "mamba_cache_dtype",
    "mamba_ssm_cache_dtype": "mamba_ssm_cache_dtype",
    "mamba_stochastic_rounding": "enable_mamba_cache_stochastic_rounding",
}
_OF_MODEL = {
    "architecture": "architecture",
    "quantization": "quantization",
    "without_sliding_window": "disable_sliding_window",
}
_ROPE_BY_LENGTH = ("longrope", "su", "dynamic")  # factors depend on the context length


def reported_settings(vllm_config: Any) -> dict[str, object]:  # noqa: ANN401 (vLLM is untyped here)
    """Settings that change numbers, besides the dtypes of weights and head; unset ones omitted.

    Args:
        vllm_config: `VllmConfig` of a running engine, or of one to be started.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    found = {name: getattr(cache, own, None) for name, own in _OF_CACHE.items()}
    found |= {name: getattr(model, own, None) for name, own in _OF_MODEL.items()}
    if str(vllm_config.load_config.load_format) == "dummy":
        found["weights"] = "dummy"  # random weights, for measuring speed
    quant_config = getattr(vllm_config, "quant_config", None)
    if quant_config is not None:
        found["quantization_hash"] = settings_hash(vars(quant_config))
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None:
        found["speculative_method"] = str(speculative.method)
    text_config = model.hf_text_config
    rope = getattr(text_config, "rope_parameters", None) or getattr(
        text_config, "rope_scaling", None
    )
    found["rope"] = rope
    found["model_config_hash"] = settings_hash(model.hf_config.to_dict())
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if isinstance(rope, dict) and kind in _ROPE_BY_LENGTH:
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(text_config, "original_max_position_embeddings", None)
        found["rope_length"] = (
            model.max_model_len
            if kind == "dynamic" or original is None
            else "long"
            if model.max_model_len > original
            else "short"
        )
    plain = {name: _as_json(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value not in (None, False, [], {})}


def _as_json(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
