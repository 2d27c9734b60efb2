"""Steps of gpu_report.py about training: each figure with what was predicted of it without a GPU.

Predictions come from bytes and products (copy 3.0 TB/s, 55 GB/s over PCIe 5) and none has been
measured; a figure that misses its prediction corrects the prediction.
"""

from __future__ import annotations

from typing import Any

from gpu_report_parts import Figure, Result, Step

PART = "step"
_BYTES_PER_S = 3.0e12
_ADAMW_BYTES = 28  # per weight: it reads weight, gradient and two moments, and writes all but one
_FOREACH_RATIO = 2.5  # of the fused kernel's time: it reads and writes its temporaries too


def training_steps(*, smoke: bool) -> list[Step]:
    """The steps, in order; small sizes on the CPU for `smoke`."""
    if smoke:
        size = ("--shape", "tiny", "--tokens", "64", "--repeats", "1", "--without-compile")
        arguments = ("--device", "cpu", *size)
        return [Step(PART, "a step's parts", "tools/bench_step.py", arguments, 200, _unjudged)]
    return [
        Step(
            PART, f"a step's parts, Qwen3 {shape}", "tools/bench_step.py",
            ("--device", "cuda", "--shape", shape), 75, step_figures,
        )
        for shape in ("0.6b", "1.7b")
    ]  # fmt: skip


def step_figures(result: Result) -> list[Figure]:
    """Figures of bench_step.py beside their predictions."""
    where = f"{result['shape']}, {result['tokens']:,} tokens"
    copies, optimizer = result["copy_ms"], result["optimizer_ms"]
    waits, num_waits = result["waits"], result["num_waits"]
    fused_ms = _ADAMW_BYTES * result["num_parameters"] / _BYTES_PER_S * 1e3
    figures = [
        Figure(
            f"{where}: waits for the GPU in a micro-batch", f"{num_waits} {waits}".strip(),
            "predicted 0", num_waits == 0,
        )
    ]  # fmt: skip
    if "pinned" in copies:
        # About 30 calls that only put work in the queue.
        figures.append(_at_most(f"{where}: CPU's time to copy, pinned", copies["pinned"], 0.5))
    figures += [
        Figure(f"{where}: CPU's time to copy, pageable", f"{copies['pageable']:.2f} ms"),
        _near(f"{where}: AdamW, fused", optimizer["fused"], fused_ms),
        _near(f"{where}: AdamW, foreach", optimizer["foreach"], fused_ms * _FOREACH_RATIO),
    ]
    short = result["short_ms"]
    figures += [
        Figure(f"{where}: forward and backward", f"{result['pass_ms']:.0f} ms"),
        Figure(
            f"{where}: short traces, time when they share rows",
            f"{short['packed'] / short['alone']:.2f}", "predicted below 1",
            short["packed"] < short["alone"],
        ),
    ]  # fmt: skip
    if "compiled_pass_ms" in result:
        compiled = result["compiled_pass_ms"] / result["pass_ms"]
        figures.append(
            Figure(
                f"{where}: time with --compile", f"{compiled:.2f}", "predicted 0.75 to 0.87",
                0.70 <= compiled <= 0.90,
            )
        )  # fmt: skip
    return [*figures, *_memory(where, result["memory"])]


def _memory(where: str, memory: dict[str, Any]) -> list[Figure]:
    predicted = memory["predicted_bytes"] / 2**30
    if "peak_bytes" not in memory:
        return [
            Figure(f"{where}: memory", "not counted on a CPU", f"predicted {predicted:.1f} GiB")
        ]
    peak = memory["peak_bytes"] / 2**30
    return [
        Figure(
            f"{where}: memory", f"{peak:.1f} GiB", f"predicted {predicted:.1f} GiB",
            abs(peak - predicted) <= 0.15 * peak,
        )
    ]  # fmt: skip


def _near(what: str, found_ms: float, predicted_ms: float) -> Figure:
    is_near = abs(found_ms - predicted_ms) <= 0.3 * predicted_ms
    return Figure(what, f"{found_ms:.1f} ms", f"predicted {predicted_ms:.1f} ms", is_near)


def _at_most(what: str, found_ms: float, most_ms: float) -> Figure:
    return Figure(
        what, f"{found_ms:.2f} ms", f"predicted at most {most_ms:g} ms", found_ms <= most_ms
    )


def _unjudged(result: Result) -> list[Figure]:
    """Figures of another size and machine, without what was predicted for a GPU."""
    return [Figure(figure.what, figure.value) for figure in step_figures(result)]
