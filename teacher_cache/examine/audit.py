"""`cache-teacher audit`: are a cache's distributions those of its teacher?

A random sample of traces is scored again by an engine that was not used in the capture. The same
traces are scored twice, in two equivalent ways: any difference between these is the engine's
own noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from teacher_cache.capture.configs import CaptureConfig, check_engine_args
from teacher_cache.capture.run import started
from teacher_cache.engines import Teacher, TeacherRequest
from teacher_cache.engines.start import LOCAL_ENGINES, check_engine_args_early, start_teacher
from teacher_cache.examine.fidelity import Compared, add_noise, compare_trace
from teacher_cache.format import (
    Cache,
    CacheError,
    CacheHeader,
    CacheMismatchError,
    CachePath,
    NoiseFloor,
    Trace,
    open_cache,
)
from teacher_cache.sources.tokenizer import ModelFiles, load_tokenizer
from teacher_cache.terminal.capture_progress import CaptureProgress
from teacher_cache.terminal.option import check_options, option, same_option
from teacher_cache.terminal.progress import Progress

LIVE_WIDTH = 4096  # candidates per row of the engine, at most: 32 kB per token


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """`cache-teacher audit`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    model: str = same_option(CaptureConfig, "model", basic=False)
    revision: str | None = same_option(CaptureConfig, "revision")
    engine: str = same_option(
        CaptureConfig,
        "engine",
        default="transformers",
        help="Program that scores the sample; best not the one that made the cache.",
        choices=LOCAL_ENGINES,
        basic=False,
    )
    dtype: str = same_option(CaptureConfig, "dtype")
    engine_arg: Mapping[str, object] = same_option(CaptureConfig, "engine_arg")
    trust_remote_code: bool = same_option(CaptureConfig, "trust_remote_code")
    any_model: bool = option(
        "Accept weights other than the capture's; the tokenizer must still match.",
        default=False,
        group="Teacher",
    )
    num_traces: int = option(
        "Number of traces to score again; more give a more certain verdict.",
        default=32,
        group="Sample",
        at_least=1,
    )
    max_tokens: int | None = option(
        "Most tokens to score again: traces are drawn until their tokens reach it, the last one "
        "cut there.",
        default=None,
        unset="all tokens of the drawn traces",
        group="Sample",
        at_least=2,
    )
    seed: int = option("Seed for drawing the traces.", default=0, group="Sample", at_least=0)
    # Measured on tools/tiny-teacher, captured by vLLM in float32: 5e-6 (the grid of the cache
    # alone), 8e-6 in bfloat16, 3e-4 with weights 3 % off, 7e-2 for another model.
    max_kl: float = option(
        "Largest mean KL from stored to live distributions that passes, in nats per token.",
        default=1e-3,
        group="Sample",
        at_least=0,
    )
    allow_unsealed: bool = option(
        "Audit the committed part of an incomplete cache.",
        default=False,
        group="Sample",
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_engine_args(self.engine, self.engine_arg)


@dataclass(frozen=True)
class Spread:
    """Distribution of nats per token over the tokens compared."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Audit:
    """Result of an audit. KL is over the kept entries and one bucket for the tail."""

    cache: str
    engine: str
    engine_version: str
    dtype: str
    num_traces: int
    num_tokens: int  # with a stored distribution
    kl: Spread  # stored || live
    rounding: Spread  # live as it would be stored || live
    noise: Spread  # live || live, scored in a second way
    noise_from: str  # description of that way
    noise_floor: NoiseFloor | None  # as the capture measured it
    kl_if_moved: Mapping[int, float]  # mean KL to the row before (-1) and after (1)
    worst_trace: str
    worst_token: int
    top1_agreement: float
    nll_stored: float  # of the traces' tokens, nats per token
    nll_live: float
    cut_by_top_k: float  # KL lost if dropped ids share their mass evenly
    cut_by_mass: float  # further loss
    live_width: int  # entries per row of the engine; below the vocabulary, losses are lower bounds
    vocab_size: int
    num_outside: int  # stored entries outside the engine's; compared with its least one
    max_kl: float

    @property
    def times_the_floor(self) -> float:
        """Mean KL from stored to live, in units of what alone would be found.

        That is what storing rounds, and the larger of the capture's noise floor and this engine's
        noise. About 1 for a cache of this teacher.
        """
        captured = 0.0 if self.noise_floor is None else self.noise_floor.mean
        floor = self.rounding.mean + max(self.noise.mean, captured)
        return self.kl.mean / floor if floor > 0 else float(self.kl.mean > 0)

    @property
    def passed(self) -> bool:
        """Whether the mean KL is within the limit."""
        return self.kl.mean <= self.max_kl


def audit(config: AuditConfig) -> Audit:
    """Score a sample of a cache's traces again and compare.

    Memory: the rows of one trace, and every sampled trace as stored.

    Raises:
        CacheMismatchError: If the model is not the cache's teacher, or the stored distributions
            belong to neighbouring tokens.
        CacheError: If the cache cannot be read or holds nothing to compare.
        EngineError: If the model cannot be run.
    """
    check_engine_args_early(config.engine, config.engine_arg)
    cache = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
    if cache.header.derived is not None:
        raise CacheMismatchError(
            f"{cache.path}: its distributions are carried over from another tokenizer; no teacher "
            "produces them. Audit the cache that it was made from (fingerprint "
            f"{cache.header.derived.get('fingerprint')}), and see `cache-teacher inspect` for what "
            "was lost on the way"
        )
    if not cache.header.has_tails:
        raise CacheMismatchError(
            f"{cache.path}: it was imported from rows that do not tell the probability outside "
            "their entries, so that it cannot be compared with the teacher's"
        )
    with Progress("comparing the model with the teacher's"):
        _require_teacher(cache.header, config)
    traces = sample_traces(cache, config.num_traces, config.seed)
    lengths = lengths_within(traces, config.max_tokens)
    width = min(cache.header.vocab_size, LIVE_WIDTH)
    longest = max(lengths.values())
    num_reserved = int(config.engine == "vllm")  # which scores a trace as a prompt plus a token
    files = ModelFiles(config.model, config.revision, config.trust_remote_code)
    limit = files.context_length(longest, num_reserved=num_reserved)
    start = partial(
        start_teacher,
        config.engine,
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        top_k=width,
        max_model_len=limit + num_reserved,
        sampling=None,
        engine_args=config.engine_arg,
        rows_from="logprobs",  # whole traces are scored
        trust_remote_code=config.trust_remote_code,
    )
    teacher = started(f"starting {config.engine} for {config.model}", start)
    with closing(teacher):
        if teacher.facts.vocab_size != cache.header.vocab_size:
            raise CacheMismatchError(
                f"{cache.path}: the cache's vocabulary has {cache.header.vocab_size} ids, the "
                f"model's {teacher.facts.vocab_size}"
            )
        lengths = {name: min(length, limit) for name, length in lengths.items()}
        traces = [trace for trace in traces if trace.trace_id in lengths]
        compared, noise_from = _compare(traces, teacher, lengths, cache.header)
        return _summary(cache, compared, noise_from, teacher, config.max_kl)


def sample_traces(cache: Cache, num_samples: int, seed: int) -> list[Trace]:
    """Draw a sample of a cache's traces, as far as held, independent of their shards.

    Raises:
        CacheError: If no drawn trace has distributions.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(cache.traces))[:num_samples]
    read = cache.read_held(cache.traces[place] for place in sorted(drawn))
    traces = [trace for trace in read if trace.num_entries]
    if not traces:
        raise CacheError(f"{cache.path}: no trace with distributions among {len(drawn)} drawn")
    return traces


def lengths_within(traces: Sequence[Trace], max_tokens: int | None) -> dict[str, int]:
    """Trace -> tokens of it to score, all of them together at most `max_tokens`.

    A trace that would be cut before its first distribution is left out.

    Raises:
        CacheError: If no trace is left.
    """
    lengths, left = dict[str, int](), max_tokens
    for trace in traces:
        length = len(trace.token_ids) if left is None else min(left, len(trace.token_ids))
        left = None if left is None else left - length
        if (trace.k[:length] > 0).any():
            lengths[trace.trace_id] = length
    if not lengths:
        raise CacheError(
            f"none of the first {max_tokens} tokens drawn has a distribution: they are the prompt "
            "of the first trace. Give --max-tokens more"
        )
    return lengths


def _require_teacher(header: CacheHeader, config: AuditConfig) -> None:
    trusted = config.trust_remote_code
    load_tokenizer(header, config.model, trust_remote_code=trusted)
    found = ModelFiles(config.model, config.revision, trusted).weights_fingerprint()
    if found != header.teacher_fingerprint and not config.any_model:
        raise CacheMismatchError(
            f"model {config.model!r} has other weights ({found}) than the cache's teacher had "
            f"({header.teacher!r}, {header.teacher_fingerprint}). Another copy of the same "
            "weights, say a folder instead of a hub id, is accepted with --any-model"
        )


def _compare(
    traces: Sequence[Trace], teacher: Teacher, lengths: Mapping[str, int], header: CacheHeader
) -> tuple[list[Compared], str]:
    from teacher_cache.engines.transformers import OTHER_CHUNK_TOKENS, TransformersTeacher

    by_id = {trace.trace_id: trace for trace in traces}
    compared: dict[str, Compared] = {}
    with CaptureProgress(2 * len(traces), doing="scored") as progress:
        for rows in teacher.run(_requests(traces, lengths)):
            trace = by_id[rows.request_id]
            compared[rows.request_id] = compare_trace(trace, rows, header)
            progress.add(len(rows.token_ids))
        if isinstance(teacher, TransformersTeacher):
            noise_from = f"{OTHER_CHUNK_TOKENS} tokens at a time, not {teacher.chunk_tokens}"
            teacher.chunk_tokens = OTHER_CHUNK_TOKENS
        else:
            noise_from = "in reverse order, so in other batches"
        for rows in teacher.run(_requests(traces[::-1], lengths)):
            add_noise(compared[rows.request_id], by_id[rows.request_id], rows)
            progress.add(len(rows.token_ids))
    return list(compared.values()), noise_from


def _requests(traces: Sequence[Trace], lengths: Mapping[str, int]) -> Iterator[TeacherRequest]:
    for trace in traces:
        tokens = tuple(trace.token_ids[: lengths[trace.trace_id]].tolist())
        yield TeacherRequest(trace.trace_id, tokens, max_new_tokens=0, seed=0, capture_prompt=True)


def _summary(
    cache: Cache,
    compared: Sequence[Compared],
    noise_from: str,
    teacher: Teacher,
    max_kl: float,
) -> Audit:
    def all_of(get: Callable[[Compared], NDArray[np.generic]]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.concatenate([get(one) for one in compared], dtype=float)
        return values

    kl = all_of(lambda one: one.kl)
    moved = {
        -1: float(all_of(lambda one: one.kl_if_moved[-1]).mean()),
        1: float(all_of(lambda one: one.kl_if_moved[1]).mean()),
    }
    worst = max(compared, key=lambda one: one.kl.max())
    by_top_k = float(all_of(lambda one: one.cut_by_top_k).mean())
    found = Audit(
        cache=cache.path,
        engine=teacher.facts.engine,
        engine_version=teacher.facts.engine_version,
        dtype=teacher.facts.dtype,
        num_traces=len(compared),
        num_tokens=len(kl),
        kl=_spread(kl),
        rounding=_spread(all_of(lambda one: one.rounding)),
        noise=_spread(all_of(lambda one: one.noise)),
        noise_from=noise_from,
        noise_floor=cache.manifest.noise,
        kl_if_moved=moved,
        worst_trace=worst.trace_id,
        worst_token=int(worst.tokens[worst.kl.argmax()]),
        top1_agreement=float(all_of(lambda one: one.is_top1).mean()),
        nll_stored=float(all_of(lambda one: one.nll_stored).mean()),
        nll_live=float(all_of(lambda one: one.nll_live).mean()),
        cut_by_top_k=by_top_k,
        cut_by_mass=float(all_of(lambda one: one.cut_by_both).mean()) - by_top_k,
        live_width=min(teacher.facts.vocab_size, LIVE_WIDTH),
        vocab_size=teacher.facts.vocab_size,
        num_outside=sum(one.num_outside for one in compared),
        max_kl=max_kl,
    )
    step = min(moved, key=lambda step: moved[step])
    if not found.passed and moved[step] < found.kl.mean / 2:
        raise CacheMismatchError(
            f"{cache.path}: the stored distributions belong to the token "
            f"{'before' if step < 0 else 'after'} each: mean KL {found.kl.mean:.3g} to their own "
            f"token's, {moved[step]:.3g} to that one's. The capture was off by one; capture again"
        )
    return found


def _spread(values: NDArray[np.float64]) -> Spread:
    return Spread(float(values.mean()), float(np.quantile(values, 0.99)), float(values.max()))
