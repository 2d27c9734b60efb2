"""What can be set for a capture, checked before anything heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.capture.job import ONLY_WORKER
from teacher_cache.format import MAX_K, CachePath, parse_worker
from teacher_cache.sources import PROMPT_TURNS, Input, RowColumns, TraceSlice


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What both ways of capturing need to know."""

    model: str
    out: CachePath
    engine: str = "vllm"
    top_k: int = 64
    mass: float = 0.999
    revision: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    engine_arg: Mapping[str, object] = field(default_factory=dict)
    template_arg: Mapping[str, object] = field(default_factory=dict)
    think_open: str = "<think>"
    think_close: str = "</think>"
    num_bands: int = 20
    limit: int | None = None
    strict: bool = False
    id_field: str = RowColumns.id_field
    prompt_field: str | None = None
    apply_chat_template: bool = False
    drop_system: bool = False
    dataset_config: str | None = None
    split: str = Input.split
    ids_file: Path | None = None
    worker: str = ONLY_WORKER
    workers: int = 1
    ray_address: str | None = None
    tensor_parallel_size: int = 1
    journal: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_K:
            raise ValueError(f"top-k: expected 1 to {MAX_K} entries per token, got {self.top_k}")
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass: expected a probability in (0, 1], got {self.mass}")
        if not (self.think_open and self.think_close):
            raise ValueError("thinking marks: expected text, got none")
        if self.engine_arg and self.engine != "vllm":
            raise ValueError("engine arguments are vLLM's; the transformers engine takes none")
        parse_worker(self.worker)
        if self.on_cluster and self.worker != ONLY_WORKER:
            raise ValueError("--worker is for processes without Ray; leave it out with --workers")
        if self.tensor_parallel_size > 1 and self.engine != "vllm":
            raise ValueError("tensor-parallel-size is vLLM's; transformers runs on one GPU")
        if "tensor_parallel_size" in self.engine_arg:
            raise ValueError("engine arguments: give --tensor-parallel-size instead")

    @property
    def on_cluster(self) -> bool:
        """Whether Ray places the engines."""
        return self.workers > 1 or self.ray_address is not None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CaptureConfig):
    """`cache-teacher generate`. None stands for the model's own default."""

    prompts: Path
    temperature: float | None = None
    top_p: float | None = None
    sample_top_k: int | None = None
    max_tokens: int | None = None
    stop_at_tokens: int | None = None
    seed: int = 0
    samples_per_prompt: int = 1
    capture_prompt: bool = False
    prompt_turns: str = RowColumns.prompt_turns

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt_turns(self)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(CaptureConfig):
    """`cache-teacher score`."""

    traces: Path
    response_field: str | None = None
    reasoning_field: str | None = None
    slice: str | None = None
    capture_prompt: bool = True
    prompt_turns: str = RowColumns.prompt_turns

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt_turns(self)
        if self.slice is not None:
            TraceSlice.parse(self.slice)


def _check_prompt_turns(config: GenerateConfig | ScoreConfig) -> None:
    if config.prompt_turns not in PROMPT_TURNS:
        raise ValueError(
            f"prompt turns: expected {' or '.join(PROMPT_TURNS)}, got {config.prompt_turns!r}"
        )
    if config.prompt_turns != RowColumns.prompt_turns and not config.capture_prompt:
        raise ValueError("prompt turns: no token of the prompt is kept without --capture-prompt")
