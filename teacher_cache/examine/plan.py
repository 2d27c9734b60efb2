"""`cache-teacher plan`: the cost of a capture, and the number of student runs that repay it.

Every figure is a step that states its origin: given, measured on a sample, or computed from
the steps before it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import partial

import numpy as np

from teacher_cache.format import (
    Cache,
    CacheError,
    CacheMismatchError,
    CachePath,
    bands_of_tokens,
    lead_span_lengths,
    open_cache,
)
from teacher_cache.format.writing.writer import SHARD_BYTES
from teacher_cache.terminal.option import check_options, option

LEAD_SPANS = (0.5, 0.25)  # whose bytes are reported besides the whole
_HOUR_S = 3600


_capture = partial(option, group="Capture", default=None)
_runs = partial(option, group="Student runs")
_live = partial(option, group="Live teacher to compare with", default=None)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`cache-teacher plan`; values of None are measured on the sample or left out."""

    num_prompts: int = _capture("Number of prompts in the capture.", default=MISSING, at_least=1)
    sample: CachePath | None = _capture(
        "Cache of some of the prompts, made with --limit, to measure lengths and bytes on."
    )
    samples_per_prompt: int = _capture("Traces per prompt.", default=1, at_least=1)
    tokens_per_trace: float | None = _capture(
        "Tokens per trace, prompt included.", above=0, unset="the sample's"
    )
    bytes_per_token: float | None = _capture(
        "Bytes of the cache per token.", above=0, unset="the sample's"
    )
    tokens_per_s: float | None = _capture(
        "Tokens per second of the capture on all its GPUs, prompts included, as a trial run shows.",
        above=0,
    )
    num_gpus: int = _capture("Number of GPUs behind the rates.", default=1, at_least=1)
    runs: int = _runs("Number of student runs on this cache.", default=1, at_least=1)
    epochs: float = _runs("Epochs of every run.", default=1.0, above=0)
    lead_span: float = _runs(
        "Proportion of every trace that a run trains on.", default=1.0, above=0, at_most=1
    )
    live_tokens_per_s: float | None = _live(
        "Tokens per second of a live teacher beside a student, on all its GPUs.", above=0
    )
    gpu_tflops: float | None = _live(
        "TFLOP/s that a GPU actually reaches; replaces a measured rate.", above=0
    )
    teacher_params: float | None = _live(
        "Active parameters of the teacher, such as 32B.", above=0, has_unit_letters=True
    )
    student_params: float | None = _live(
        "Parameters of the student, such as 1.5B.", above=0, has_unit_letters=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("tokens_per_trace", "bytes_per_token"):
            if self.sample is None and getattr(self, name) is None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"expected a sample (--sample) or {flag}, got neither")
        if self.gpu_tflops is not None and self.teacher_params is None:
            raise ValueError("--gpu-tflops: needs --teacher-params to compute the work")


@dataclass(frozen=True)
class Step:
    """One figure of a plan."""

    name: str
    value: float
    unit: str
    how: str  # its arithmetic or origin


def plan(config: PlanConfig) -> list[Step]:
    """Yield the steps of the arithmetic, in order.

    Raises:
        CacheError: If the sample cannot be read, is empty or was truncated.
    """
    sample = None if config.sample is None else _Sample.of(config.sample)
    steps = list(_size(config, sample))
    tokens = next(step.value for step in steps if step.name == "tokens")
    return [*steps, *_cost(config, tokens)]


@dataclass(frozen=True)
class _Sample:
    """Facts about the whole from a captured sample."""

    measured: Mapping[str, Step]  # by name
    read_shares: Mapping[float, float]  # lead span -> share of the bytes that it reads

    @classmethod
    def of(cls, path: CachePath) -> "_Sample":
        cache = open_cache(path, allow_unsealed=True)
        if cache.header.is_truncated:
            raise CacheMismatchError(
                f"{cache.path}: a sample must hold whole traces; plan from one that was "
                "captured without a lead span"
            )
        catalog = cache.catalog
        lengths = catalog.numbers("n_total")[catalog.counted]
        if len(lengths) < 2:
            raise CacheError(
                f"{cache.path}: {len(lengths)} traces are no sample; capture more (--limit)"
            )
        error = 1.96 * float(np.std(lengths, ddof=1)) / len(lengths) ** 0.5
        num_bytes, num_tokens = catalog.total("size_bytes"), catalog.num_tokens
        is_small = num_bytes < len(cache.shards) * SHARD_BYTES / 2
        steps = (
            Step(
                "tokens per trace",
                float(np.mean(lengths)),
                "",
                f"mean of {len(lengths):,} traces in {cache.path}, +-{error:,.1f} (95 %)",
            ),
            Step(
                "bytes per token",
                num_bytes / num_tokens,
                "",
                f"{num_bytes:,} bytes / {num_tokens:,} tokens in {cache.path}"
                + (" (full shards need less)" if is_small else ""),
            ),
        )
        return cls(
            {step.name: step for step in steps},
            {span: _bytes_read(cache, span) / num_bytes for span in LEAD_SPANS},
        )


def _bytes_read(cache: Cache, lead_span: float) -> int:
    """Bytes that a reader of all traces reads from the shards: whole bands."""
    catalog, num_bands = cache.catalog, cache.header.num_bands
    n_total = catalog.numbers("n_total")
    needed = bands_of_tokens(n_total, lead_span_lengths(n_total, lead_span), num_bands)
    of_shard = np.maximum.reduceat(needed, catalog.first_row[:-1])
    return int(catalog.band_ends[np.arange(catalog.num_shards), of_shard].sum())


def _size(config: PlanConfig, sample: _Sample | None) -> Iterator[Step]:
    """Steps for the amount to capture and to store."""
    traces = config.num_prompts * config.samples_per_prompt
    yield Step(
        "traces",
        traces,
        "",
        f"{config.num_prompts:,} prompts x {config.samples_per_prompt:,} traces each (given)",
    )
    measured = {} if sample is None else sample.measured
    length = _given_or_measured("tokens per trace", config.tokens_per_trace, measured)
    yield length
    tokens = traces * length.value
    yield Step("tokens", tokens, "", f"{traces:,} traces x {length.value:,.1f}")
    width = _given_or_measured("bytes per token", config.bytes_per_token, measured)
    yield width
    disk = tokens * width.value
    yield Step("disk", disk, "bytes", f"{tokens:,.0f} tokens x {width.value:.2f} bytes")
    for span in LEAD_SPANS:
        if sample is None:
            share, how = span, "if entries are alike along a trace"
        else:
            share, how = sample.read_shares[span], "measured on the sample's bands"
        yield Step(
            f"read at lead span {span:g}", disk * share, "bytes", f"{share:.3f} of it, {how}"
        )


def _given_or_measured(name: str, given: float | None, measured: Mapping[str, Step]) -> Step:
    return measured[name] if given is None else Step(name, given, "", "given")


def _cost(config: PlanConfig, tokens: float) -> Iterator[Step]:
    """Steps for the GPU hours of the capture and of a live teacher beside every student."""
    capture_h = None
    if config.tokens_per_s is not None:
        capture_h = tokens / config.tokens_per_s * config.num_gpus / _HOUR_S
        yield Step(
            "capture",
            capture_h,
            "GPU hours",
            f"{tokens:,.0f} tokens / {config.tokens_per_s:,.0f} tokens/s x {config.num_gpus} GPU "
            "/ 3,600 (rate given)",
        )
    seen = tokens * config.lead_span * config.epochs
    yield Step(
        "tokens per student run",
        seen,
        "",
        f"{tokens:,.0f} x lead span {config.lead_span:g} x {config.epochs:g} epochs (given)",
    )
    yield from _teacher_steps(config, seen)
    live_h = None
    if config.live_tokens_per_s is not None:
        live_h = seen / config.live_tokens_per_s * config.num_gpus / _HOUR_S
        how = f"/ {config.live_tokens_per_s:,.0f} tokens/s x {config.num_gpus} GPU / 3,600 (given)"
    elif config.gpu_tflops is not None and config.teacher_params is not None:
        live_h = 2 * config.teacher_params * seen / (config.gpu_tflops * 1e12) / _HOUR_S
        how = (
            f"x 2 x {config.teacher_params:,.3g} parameters / {config.gpu_tflops:g} TFLOP/s / 3,600"
        )
    if live_h is not None:
        yield Step("live teacher per run", live_h, "GPU hours", f"{seen:,.0f} tokens {how}")
    yield from _break_even(config, capture_h, live_h)


def _billions(params: float) -> str:
    return f"{params / 1e9:g}B parameters"


def _teacher_steps(config: PlanConfig, seen: float) -> Iterator[Step]:
    """Steps for a live teacher's compute and memory."""
    params = config.teacher_params
    if params is None:
        return
    yield Step(
        "live teacher's work per run",
        2 * params * seen,
        "FLOPs",
        f"2 FLOPs x {_billions(params)} x {seen:,.0f} tokens (one forward)",
    )
    yield Step(
        "live teacher's memory",
        2 * params,
        "bytes",
        f"2 bytes x {_billions(params)}, beside every student",
    )
    if config.student_params is not None:
        share = 2 * params / (2 * params + 6 * config.student_params)
        yield Step(
            "live teacher's share of a step",
            share,
            "",
            f"FLOPs: 2 x {_billions(params)} / (2 x {_billions(params)} + "
            f"6 x {_billions(config.student_params)})",
        )


def _break_even(
    config: PlanConfig, capture_h: float | None, live_h: float | None
) -> Iterator[Step]:
    """Steps for the number of runs after which the capture costs less than a live teacher."""
    if capture_h is not None and live_h is not None:
        yield Step(
            "break-even",
            capture_h / live_h,
            "runs",
            f"{capture_h:,.3g} / {live_h:,.3g} GPU hours, all of the capture counted, although the "
            "traces themselves are needed in any case",
        )
        yield Step(
            f"saved in {config.runs:,} runs",
            config.runs * live_h - capture_h,
            "GPU hours",
            f"{config.runs:,} x {live_h:,.3g} - {capture_h:,.3g} (negative: not paid off yet)",
        )
