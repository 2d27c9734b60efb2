"""CPU time per trace of scoring several responses to each long prompt, with and without sharing.

    python tools/bench_shared_prompts.py                     # the tiny teacher, any machine
    python tools/bench_shared_prompts.py --model smollm2 --num-prompts 2

Only the responses' rows are wanted (`score --no-capture-prompt`). Shared: the engine may find a
prompt's tokens in its prefix cache. Both ways in turn on one engine, other prompts in every round;
the largest difference of a logprob between them is shown too.
"""

import argparse
import itertools
import json
import logging
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
from bench_capture_parts import cpu_s
from bench_json import write_figures

from teacher_cache.engines import TeacherRequest, TeacherRows
from teacher_cache.engines.vllm import VllmTeacher
from teacher_cache.engines.vllm.shared_prompts import SharedPrompts

TOOLS = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TOOLS / "tiny-teacher"))
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--response-tokens", type=int, default=100)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="ms of CPU per trace, both ways")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    length = arguments.prompt_tokens + arguments.response_tokens
    # A model of shorter traces than these is fast on longer ones too.
    longest = max(length + 1, int(config["max_position_embeddings"]))
    teacher = VllmTeacher(
        model=arguments.model,
        top_k=arguments.top_k,
        max_model_len=length,
        engine_args={"hf_overrides": {"max_position_embeddings": longest}},
    )
    try:
        measure(teacher, arguments, int(config["vocab_size"]))
    finally:
        teacher.close()


def measure(teacher: VllmTeacher, arguments: argparse.Namespace, vocab_size: int) -> None:
    cpu_ms: dict[bool, list[float]] = {False: [], True: []}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    largest = 0.0
    for number in range(arguments.rounds + 1):  # the first warms up
        requests = made(arguments, vocab_size, number)
        found: dict[bool, dict[str, TeacherRows]] = {}
        for is_shared in (False, True) if number % 2 else (True, False):
            teacher._engine.reset_prefix_cache()
            own = SharedPrompts.may_read
            allowed = own if is_shared else (lambda _self, _request: False)
            with mock.patch.object(SharedPrompts, "may_read", allowed):
                teacher._shared_prompts._seen.clear()
                began_s, began_cpu_s = time.perf_counter(), cpu_s()
                found[is_shared] = {rows.request_id: rows for rows in teacher.run(requests)}
                if number:
                    cpu_ms[is_shared].append((cpu_s() - began_cpu_s) / len(requests) * 1e3)
                    seconds[is_shared].append((time.perf_counter() - began_s) / len(requests))
        for name, rows in found[True].items():
            difference = np.abs(rows.row_logprobs - found[False][name].row_logprobs)
            largest = max(largest, float(difference.max()))
    for is_shared in (False, True):
        print(
            f"{'shared' if is_shared else 'each prompt computed':22}"
            f"{statistics.median(cpu_ms[is_shared]):9.1f} ms of CPU per trace,"
            f"{statistics.median(seconds[is_shared]) * 1e3:9.1f} ms"
        )
    of_cpu = {True: "shared_cpu_ms", False: "computed_cpu_ms"}
    write_figures(
        arguments.json,
        {of_cpu[way]: statistics.median(found_ms) for way, found_ms in cpu_ms.items()},
    )
    ratios = [one / other for one, other in zip(cpu_ms[True], cpu_ms[False], strict=True)]
    print(
        f"shared / computed {statistics.median(ratios):.3f}; largest difference {largest:.2g} nats"
    )


def made(arguments: argparse.Namespace, vocab_size: int, seed: int) -> list[TeacherRequest]:
    """Responses of random tokens to prompts of random tokens, those of a prompt side by side."""
    random = np.random.default_rng(seed)

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(random.integers(0, vocab_size, length).tolist())

    prompts = [drawn(arguments.prompt_tokens) for _ in range(arguments.num_prompts)]
    return [
        TeacherRequest(
            request_id=f"{number}-{sample}",
            token_ids=prompts[number] + drawn(arguments.response_tokens),
            max_new_tokens=0,
            seed=0,
            capture_prompt=False,
            first_row=arguments.prompt_tokens,
        )
        for number, sample in itertools.product(range(len(prompts)), range(arguments.samples))
    ]


if __name__ == "__main__":
    main()
