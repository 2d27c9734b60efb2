"""Cost of capturing beside generating alone: real vLLM, every way in turn on one engine.

    python tools/bench_capture.py                             # the tiny teacher, any machine
    python tools/bench_capture.py --shape qwen3-4b --max-new-tokens 1024 --concurrency 256   # a GPU

Ways, all with the same requests, window and sampling:

    bare      no logprobs
    one       1 logprob per token, thrown away: the worker's log-softmax, the scheduler's slicing
    dropped   K logprobs per token, thrown away: the worker's top-k and the transport come on top
    flat      K logprobs as `FlatLogprobs`, each read once by plain Python, nothing stored
    fallback  our capture to disk from `FlatLogprobs`
    taken     rows that vLLM's worker takes from the logits, put together and thrown away
    arrays    our capture to disk from the arrays that vLLM ships with its logprobs
    fast      our capture to disk from the rows that vLLM's worker takes from the logits

`host_us_per_token_fast` is the CPU time of our own parts in this process: rows from the ring and
put together, choosing entries, checks and the journal, the compacting thread. The rows of a capture
are recorded and replayed to captures of the same requests with the engine idle, because beside a
busy engine that shares the same cores' caches the clock would count the engine's work too. The
median of these is shown. What the worker does for a row is in `fast_over_bare`, and in the CPU time
per token of all processes of a way together, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench_capture_parts import (
    PartTimes,
    Recording,
    ReplayedTeacher,
    cpu_s,
    peak_rss_bytes,
    reset_peak_rss,
    shaped_model,
)
from bench_json import write_figures

from teacher_cache.capture import prepare
from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.capture.generate import generate
from teacher_cache.capture.noise import PREFIX
from teacher_cache.engines import TeacherRequest, TeacherRows
from teacher_cache.engines.vllm import VllmTeacher
from teacher_cache.engines.vllm.rows import tap
from teacher_cache.format import open_cache

TOOLS = Path(__file__).parent
WAYS = ("bare", "one", "dropped", "flat", "taken", "fallback", "arrays", "fast")
OURS = ("fallback", "arrays", "fast")


@dataclass
class Shared:
    """One engine for all ways; replaces the teacher that a capture would start."""

    teacher: VllmTeacher
    replayed: ReplayedTeacher | None = None  # runs instead of the engine, if any
    recording: Recording | None = None  # records the engine's output, if any
    requests: list[TeacherRequest] = field(default_factory=list)  # those of the last capture
    num_tokens: int = 0  # generated in the last run
    started_s: float = 0.0
    cpu_started_s: float = 0.0

    def __post_init__(self) -> None:
        self.facts = self.teacher.facts
        self.worker_rows = self.teacher._worker_rows
        if self.worker_rows is None:
            raise SystemExit(
                "this engine's worker gives no rows; --debug of cache-teacher says why"
            )

    def take(self, way: str) -> None:
        """Take rows this way from now on."""
        self.teacher._worker_rows = self.worker_rows if way in ("fast", "taken") else None
        self.teacher._is_tapped = way != "fallback"

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate as a Teacher does, and count; the noise floor's repeats are left out."""
        requests = iter(requests)
        first = next(requests, None)
        if first is None or first.request_id.startswith(PREFIX):
            return
        self.requests.clear()
        self.num_tokens = 0
        self.started_s, self.cpu_started_s = time.perf_counter(), cpu_s()
        teacher = self.replayed or self.teacher
        for rows in teacher.run(self._noted(itertools.chain([first], requests))):
            self.num_tokens += len(rows.token_ids) - rows.num_given
            if self.recording is not None:
                self.recording.note_finished(rows)
            yield rows

    def _noted(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRequest]:
        for request in requests:
            self.requests.append(request)
            yield request

    def close(self) -> None:
        """Keep the engine for the next run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TOOLS / "tiny-teacher"))
    parser.add_argument("--shape", help="random weights of this size instead, e.g. qwen3-4b")
    parser.add_argument("--prompts", type=Path, default=TOOLS / "prompts" / "train.jsonl")
    parser.add_argument("--num-prompts", type=int, default=300)
    parser.add_argument("--max-new-tokens", type=int, default=240)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="a GPU without compiled graphs")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    write_figures(arguments.json, result)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, engine_args = arguments.model, {"max_num_seqs": arguments.concurrency}
    if arguments.eager:
        engine_args["enforce_eager"] = True
    if arguments.shape:
        model = shaped_model(arguments.shape, folder / "model", TOOLS / "tiny-teacher")
        engine_args["load_format"] = "dummy"
    config = GenerateConfig(
        model=model,
        prompts=arguments.prompts,
        out=folder / "unused",
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        limit=arguments.num_prompts,
        engine_arg=engine_args,
    )
    start = prepare._start
    shared: list[Shared] = []

    def start_once(*call: object, head_dtype: str) -> Shared:
        if not shared:
            shared.append(Shared(start(*call, head_dtype)))
        return shared[0]

    prepare._start = start_once
    try:
        captures = itertools.count()

        def capture(way: str) -> None:
            if shared:
                shared[0].take(way)
            name = folder / f"cache-{next(captures)}"
            generate(replace(config, out=name))

        capture("fast")  # starts the engine, warms it up, and yields the requests
        return run_ways(arguments, shared[0], capture, folder)
    finally:
        prepare._start = start
        for each in shared:
            each.take("fast")
            each.teacher.close()


def run_ways(
    arguments: argparse.Namespace,
    shared: Shared,
    capture: Callable[[str], None],
    folder: Path,
) -> dict[str, Any]:
    requests, teacher = list(shared.requests), shared.teacher
    rates: dict[str, list[float]] = {}
    cpu_us: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    ways = [way for way in WAYS if way in arguments.ways.split(",")]
    for turn in range(arguments.rounds):
        for way in ways if turn % 2 == 0 else reversed(ways):
            reset_peak_rss()
            if way in OURS:
                capture(way)
                seconds, num_tokens = time.perf_counter() - shared.started_s, shared.num_tokens
                begun_s = shared.cpu_started_s
            else:
                begun_s = cpu_s()
                shared.take(way)
                loop = run_through if way == "taken" else drive
                seconds, num_tokens = loop(teacher, requests, way)
            rates.setdefault(way, []).append(num_tokens / seconds)
            cpu_us.setdefault(way, []).append((cpu_s() - begun_s) / num_tokens * 1e6)
            peaks[way] = max(peaks.get(way, 0), peak_rss_bytes())
            print(
                f"round {turn}: {way:9}{rates[way][-1]:9,.0f} tokens/s, "
                f"{cpu_us[way][-1]:7.1f} us of CPU per token",
                file=sys.stderr,
            )
    parts_s = host_parts(shared, lambda: capture("fast"), arguments.rounds)
    cache = open_cache(str(max(folder.glob("cache-*"), key=lambda each: each.stat().st_mtime)),
                       allow_unsealed=True)  # fmt: skip
    result: dict[str, Any] = {
        f"tokens_per_s_{way}": statistics.median(values) for way, values in rates.items()
    }
    for below in ("flat", "bare", "fallback", "arrays"):
        if below in rates and "fast" in rates:
            ratios = [f / b for f, b in zip(rates["fast"], rates[below], strict=True)]
            result[f"fast_over_{below}"] = statistics.median(ratios)
    stored = sum(shard.num_tokens for shard in cache.shards)
    return result | {
        "host_us_per_token_fast": sum(parts_s.values()) / shared.num_tokens * 1e6,
        "host_us_per_token": {
            name: seconds / shared.num_tokens * 1e6 for name, seconds in parts_s.items()
        },
        "cpu_us_per_token_of": {way: statistics.median(us) for way, us in cpu_us.items()},
        "peak_rss_bytes": peaks.get("fast"),
        "peak_rss_bytes_of": peaks,
        "bytes_per_token": sum(shard.size_bytes for shard in cache.shards) / stored,
        "mean_k": sum(shard.num_entries for shard in cache.shards) / shared.num_tokens,
        "num_tokens": shared.num_tokens,
        "num_prompts": len(requests),
        "top_k": arguments.top_k,
        "concurrency": arguments.concurrency,
        "rounds": arguments.rounds,
        "model": arguments.shape or Path(arguments.model).name,
        "device": device(),
        "vllm": shared.facts.engine_version,
    }


def host_parts(shared: Shared, capture: Callable[[], None], num_replays: int) -> dict[str, float]:
    """CPU seconds of our own parts in the median of several captures."""
    num_slots, num_pages = shared.worker_rows._pages._pages.shape
    shared.recording = Recording(shared.teacher._top_k, (num_slots, num_pages * 64))
    with shared.recording.made():
        capture()
    recording, shared.recording = shared.recording, None
    found = []
    for _ in range(num_replays):
        times = PartTimes()
        shared.replayed = ReplayedTeacher(recording, shared.facts, times)
        with times.measured():
            capture()
        found.append(times.seconds)
    return sorted(found, key=lambda seconds: sum(seconds.values()))[num_replays // 2]


def run_through(
    teacher: VllmTeacher, requests: Iterable[TeacherRequest], _way: str
) -> tuple[float, int]:
    """Seconds and generated tokens of the teacher without any of our capture."""
    began_s = time.perf_counter()
    num_tokens = sum(len(rows.token_ids) - rows.num_given for rows in teacher.run(requests))
    return time.perf_counter() - began_s, num_tokens


def drive(teacher: VllmTeacher, requests: Iterable[TeacherRequest], way: str) -> tuple[float, int]:
    """Seconds and generated tokens of an engine loop without any of our capture."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine, sampling = teacher._engine, teacher._sampling
    num_logprobs = {"bare": None, "one": 1}.get(way, teacher._top_k)
    source, in_flight, num_tokens = iter(requests), 0, 0
    began_s = time.perf_counter()
    while True:
        for request in itertools.islice(source, teacher._window - in_flight):
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                max_tokens=request.max_new_tokens,
                logprobs=num_logprobs,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = engine.add_request(
                f"{way}-{request.request_id}", tokens_input(list(request.token_ids)), params
            )
            if way in ("one", "dropped"):
                processor = engine.output_processor.request_states[name].logprobs_processor
                tap(processor, num_logprobs)
                processor._update_sample_logprobs = lambda shipped: None
            in_flight += 1
        if not in_flight:
            return time.perf_counter() - began_s, num_tokens
        for output in engine.step():
            if output.finished:
                in_flight -= 1
                completion = output.outputs[0]
                num_tokens += len(completion.token_ids)
                if way == "flat":
                    read_flat(completion.logprobs)


def read_flat(flat: Any) -> float:  # noqa: ANN401 (vLLM is untyped here)
    """Read `FlatLogprobs` as a script would: every token's entries, once."""
    total = 0.0
    for first, end in zip(flat.start_indices, flat.end_indices, strict=True):
        ids, logprobs = flat.token_ids[first:end], flat.logprobs[first:end]
        total += max(zip(logprobs, ids, strict=True))[0]
    return total


def device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, vLLM {result['vllm']}, {result['device']}",
        f"{result['num_prompts']} prompts, {result['num_tokens']:,} generated tokens, K = "
        f"{result['top_k']}, concurrency {result['concurrency']}, medians of {result['rounds']}",
        "",
        f"{'way':10}{'tokens/s':>10}{'of bare':>9}{'CPU us/token':>14}{'peak RSS':>11}",
    ]
    bare = result.get("tokens_per_s_bare")
    for way in WAYS:
        if f"tokens_per_s_{way}" in result:
            rate = result[f"tokens_per_s_{way}"]
            share = f"{rate / bare:9.2f}" if bare else " " * 9
            peak = result["peak_rss_bytes_of"][way] / 2**20
            cpu_us = result["cpu_us_per_token_of"][way]
            lines.append(f"{way:10}{rate:10,.0f}{share}{cpu_us:14.1f}{peak:7,.0f} MiB")
    lines.append("")
    for name, goal in (("fast_over_flat", ">= 1.0"), ("fast_over_bare", ">= 0.92, on a GPU 0.97")):
        if name in result:
            lines.append(f"{name:24}{result[name]:8.2f}   goal {goal}")
    lines.append(
        f"{'host us per token, fast':24}{result['host_us_per_token_fast']:8.2f}   goal <= 4"
    )
    for name, value in result["host_us_per_token"].items():
        lines.append(f"  {name:22}{value:8.2f}")
    lines.append(
        f"{'bytes per token':24}{result['bytes_per_token']:8.1f}   mean k {result['mean_k']:.1f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
