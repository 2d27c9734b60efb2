"""The production teacher: vLLM. The only folder that imports it."""

from teacher_cache.engines.vllm.teacher import VllmTeacher

__all__ = ["VllmTeacher"]
