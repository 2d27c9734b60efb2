"""The two ways to capture: `generate` from prompts, `score` existing traces."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from teacher_cache.capture import CaptureReport, capture
from teacher_cache.cluster import Cluster, Placement
from teacher_cache.engines import Sampling, Teacher, TeacherFacts, TeacherRequest
from teacher_cache.engines.start import start_teacher
from teacher_cache.format import MAX_K, CacheHeader, CachePath, parse_worker, shown
from teacher_cache.job import ONLY_WORKER, Job
from teacher_cache.sources import (
    PROMPT_TURNS,
    Input,
    Layout,
    PromptRenderer,
    Render,
    Slice,
    Source,
    SourceTrace,
    TraceRenderer,
    read_ids,
)
from teacher_cache.tokenizer import ModelFiles, TeacherTokenizer, ThinkMarks


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
    id_field: str = Layout.id_field
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
    prompt_turns: str = Layout.prompt_turns

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
    prompt_turns: str = Layout.prompt_turns

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt_turns(self)
        if self.slice is not None:
            Slice.parse(self.slice)


def _check_prompt_turns(config: GenerateConfig | ScoreConfig) -> None:
    if config.prompt_turns not in PROMPT_TURNS:
        raise ValueError(
            f"prompt turns: expected {' or '.join(PROMPT_TURNS)}, got {config.prompt_turns!r}"
        )
    if config.prompt_turns != Layout.prompt_turns and not config.capture_prompt:
        raise ValueError("prompt turns: no token of the prompt is kept without --capture-prompt")


def generate(config: GenerateConfig) -> CaptureReport:
    """Let the teacher answer every prompt, and keep its distributions; raises as `capture`."""
    files = ModelFiles(config.model, config.revision)
    tokenizer = _tokenizer(config, files)
    own = files.generation_config()
    sampling = Sampling(
        temperature=own.temperature if config.temperature is None else config.temperature,
        top_p=own.top_p if config.top_p is None else config.top_p,
        top_k=own.top_k if config.sample_top_k is None else config.sample_top_k,
    )
    context = files.context_length(config.max_model_len)
    longest = min(context, config.stop_at_tokens or context)

    def requests(item: SourceTrace) -> list[TeacherRequest]:
        room = longest - len(item.token_ids)
        names = [item.trace_id]
        if config.samples_per_prompt > 1:
            names = [f"{item.trace_id}#{sample}" for sample in range(config.samples_per_prompt)]
        return [
            TeacherRequest(
                request_id=name,
                token_ids=item.token_ids,
                max_new_tokens=min(room, config.max_tokens or room),
                seed=_seed(config.seed, name),
                capture_prompt=config.capture_prompt,
            )
            for name in names
        ]

    recorded = {**asdict(sampling), "max_tokens": config.max_tokens, "seed": config.seed}
    if config.stop_at_tokens is not None:
        recorded["stop_at_tokens"] = config.stop_at_tokens
    render = PromptRenderer(tokenizer, longest, files.vocab_size(), _layout(config))
    return _capture(
        config,
        _job(config, files, tokenizer, config.prompts, render, requests, sampling, recorded),
    )


def score(config: ScoreConfig) -> CaptureReport:
    """Keep the teacher's distributions over existing traces; raises as `capture`."""
    files = ModelFiles(config.model, config.revision)
    tokenizer = _tokenizer(config, files)
    # vLLM scores a trace as the prompt of one more token.
    context = files.context_length(config.max_model_len, num_reserved=config.engine == "vllm")

    def requests(item: SourceTrace) -> list[TeacherRequest]:
        return [
            TeacherRequest(
                request_id=item.trace_id,
                token_ids=item.token_ids,
                max_new_tokens=0,
                seed=0,
                capture_prompt=True,
            )
        ]

    layout = replace(
        _layout(config),
        response_field=config.response_field,
        reasoning_field=config.reasoning_field,
    )
    part = None if config.slice is None else Slice.parse(config.slice)
    render = TraceRenderer(tokenizer, context, files.vocab_size(), layout, part)
    return _capture(
        config, _job(config, files, tokenizer, config.traces, render, requests, None, None)
    )


def _capture(config: CaptureConfig, job: Job) -> CaptureReport:
    if not config.on_cluster:
        return capture(job)
    placement = Placement(config.workers, config.ray_address, config.tensor_parallel_size)
    return capture(job, partial(Cluster, placement))


def _layout(config: GenerateConfig | ScoreConfig) -> Layout:
    return Layout(
        id_field=config.id_field,
        prompt_field=config.prompt_field,
        drop_system=config.drop_system,
        apply_chat_template=config.apply_chat_template,
        prompt_turns=config.prompt_turns,
    )


def _tokenizer(config: CaptureConfig, files: ModelFiles) -> TeacherTokenizer:
    marks = ThinkMarks(config.think_open, config.think_close)
    return TeacherTokenizer(files, marks, config.template_arg)


def _job(
    config: GenerateConfig | ScoreConfig,
    files: ModelFiles,
    tokenizer: TeacherTokenizer,
    path: Path,
    render: Render,
    requests: Callable[[SourceTrace], list[TeacherRequest]],
    sampling: Sampling | None,
    recorded: Mapping[str, float | int | None] | None,
) -> Job:
    worker, part = parse_worker(config.worker)
    if config.on_cluster:
        worker = "ray"  # the driver's; the actors have names of their own
    terminal_ids = tokenizer.terminal_ids(files.generation_config().end_ids)

    def header(facts: TeacherFacts) -> CacheHeader:
        return CacheHeader(
            mode="score" if sampling is None else "generate",
            teacher=files.name,
            teacher_revision=config.revision,
            teacher_fingerprint=files.weights_fingerprint(),
            engine=facts.engine,
            engine_version=facts.engine_version,
            dtype=facts.dtype,
            head_dtype=facts.head_dtype,
            vocab_size=facts.vocab_size,
            tokenizer_size=tokenizer.size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            chat_template_hash=tokenizer.template_hash,
            think_open_ids=tokenizer.open_ids,
            think_close_ids=tokenizer.close_ids,
            terminal_token_ids=terminal_ids,
            sampling=recorded,
            top_k=config.top_k,
            mass=config.mass,
            capture_prompt=config.capture_prompt,
            num_bands=config.num_bands,
        )

    return Job(
        out=config.out,
        journal=config.journal,
        worker=worker,
        part=part,
        on_cluster=config.on_cluster,
        limit=config.limit,
        config=_resolved(config),
        source=Source(
            Input(path, config.dataset_config, config.split),
            render,
            id_field=config.id_field,
            strict=config.strict,
            only_ids=None if config.ids_file is None else read_ids(config.ids_file),
        ),
        tokenizer=tokenizer,
        requests=requests,
        header=header,
        start_teacher=partial(_start, config, files, sampling),
    )


def _resolved(config: CaptureConfig) -> dict[str, object]:
    """The configuration as JSON, without the credentials that a URI may hold."""
    values = {**asdict(config), "out": shown(config.out)}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _start(
    config: CaptureConfig, files: ModelFiles, sampling: Sampling | None, longest: int
) -> Teacher:
    return start_teacher(
        config.engine,
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        top_k=min(config.top_k, files.vocab_size()),  # a small vocabulary has no more candidates
        max_model_len=longest,
        sampling=sampling,
        engine_args={**_parallel_args(config.tensor_parallel_size), **config.engine_arg},
    )


def _parallel_args(num_gpus: int) -> dict[str, object]:
    # On a cluster vLLM would use Ray for its own processes too, which the replica's GPUs need not.
    return (
        {"tensor_parallel_size": num_gpus, "distributed_executor_backend": "mp"}
        if num_gpus > 1
        else {}
    )


def _seed(seed: int, trace_id: str) -> int:
    """A sample's own seed: independent of the order in which samples are drawn."""
    digest = hashlib.sha256(f"{seed}:{trace_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
