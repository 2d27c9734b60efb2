"""What vLLM does when more requests may run than its KV cache holds whole traces.

    python tools/bench_kv_room.py --num-traces 300 --blocks 200

An engine in this process, so that its scheduler can be counted, draws traces of log-normal length.
In turn so many are in flight: 1.5 times `max_num_seqs`, as in a capture, and the traces that the
cache holds whole, times 1, 1.33 and 1.67. Steps and tokens computed do not depend on the machine:
where a step costs the same whatever it computes (a GPU reading weights) steps are the time, where
every token costs the same (a CPU) computed tokens are.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_json import write_figures

_BLOCK_TOKENS = 32  # the CPU's attention takes multiples of it
_NUM_PROMPT = 20
_LONGEST = 512
_MEDIAN, _SPREAD = 134, 0.6  # of the new tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny-teacher"))
    parser.add_argument("--num-traces", type=int, default=300)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=200, help=f"of {_BLOCK_TOKENS} tokens")
    parser.add_argument("--json", type=Path, help="steps and tokens computed, by window")
    arguments = parser.parse_args()
    engine = started(arguments)
    counts = counted(engine)
    draw = random.Random(0)
    lengths = [
        min(_LONGEST - _NUM_PROMPT - 1, max(8, round(_MEDIAN * draw.lognormvariate(0, _SPREAD))))
        for _ in range(arguments.num_traces)
    ]
    num_useful = sum(_NUM_PROMPT + length for length in lengths)
    num_held = arguments.blocks * _BLOCK_TOKENS / (num_useful / len(lengths))
    print(f"the KV cache holds {num_held:.1f} traces of the mean length")
    print(f"{'in flight':>10}{'steps':>8}{'preempted':>11}{'computed':>10}{'CPU s':>8}")
    windows = [arguments.max_num_seqs * 3 // 2, *(int(num_held * x) for x in (1, 1.33, 1.67))]
    rows = []
    for window in windows:
        counts.update(steps=0, preempted=0, tokens=0)
        engine.reset_prefix_cache()
        began_s = time.process_time()
        draw_all(engine, lengths, window)
        print(
            f"{window:10}{counts['steps']:8,}{counts['preempted']:11,}"
            f"{counts['tokens'] / num_useful:10.2f}{time.process_time() - began_s:8.1f}"
        )
        rows.append({"name": str(window), **counts})
    write_figures(arguments.json, {"num_useful_tokens": num_useful, "in_flight": rows})


def started(arguments: argparse.Namespace) -> Any:  # noqa: ANN401 (vLLM is untyped here)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=arguments.model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=_LONGEST,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=1024,
            enable_chunked_prefill=False,
            block_size=_BLOCK_TOKENS,
            num_gpu_blocks_override=arguments.blocks,
            kv_cache_memory_bytes=2 << 30,
        )
    )


def counted(engine: Any) -> dict[str, int]:  # noqa: ANN401 (vLLM is untyped here)
    """Counts that the engine's scheduler adds to from now on."""
    scheduler = engine.engine_core.engine_core.scheduler
    counts = {"steps": 0, "preempted": 0, "tokens": 0}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*call: object, **named: object) -> object:
            result = method(*call, **named)
            counts[name] += 1
            counts["tokens"] += getattr(result, "total_num_scheduled_tokens", 0)
            return result

        return noted

    scheduler.schedule = noting("steps", schedule)
    scheduler._preempt_request = noting("preempted", preempt)
    return counts


def draw_all(engine: Any, lengths: list[int], window: int) -> None:  # noqa: ANN401 (as above)
    """Draw traces of these lengths, so many in flight."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    draw = random.Random(1)
    waiting, in_flight = list(enumerate(lengths)), 0
    while waiting or in_flight:
        while waiting and in_flight < window:
            number, length = waiting.pop(0)
            params = SamplingParams(
                max_tokens=length,
                ignore_eos=True,
                seed=number,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = [draw.randrange(3, 400) for _ in range(_NUM_PROMPT)]
            engine.add_request(f"{window}-{number}", tokens_input(prompt), params)
            in_flight += 1
        in_flight -= sum(output.finished for output in engine.step())


if __name__ == "__main__":
    main()
