"""Steps of gpu_report.py, and the figures and goals read from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    what: str
    value: str  # as it is shown
    goal: str = ""
    is_met: bool | None = None  # None where there is no goal


@dataclass(frozen=True)
class Step:
    """One script in a process of its own."""

    part: str
    name: str
    script: str  # from the root of the checkout
    arguments: tuple[str, ...]
    limit_s: int
    figures: Callable[[Result], list[Figure]]
    needs: tuple[str, ...] = ()  # modules beside torch and transformers
    if_failed: tuple[str, ...] = ()  # arguments of a second try


PARTS = ("checks", "loss", "train", "to-device", "capture", "rows")
# The loss's goals in milliseconds and GiB were set for this size (on an H200).
_GOAL_HIDDEN, _GOAL_TOKENS = 2048, 8192


def steps(*, smoke: bool) -> list[Step]:
    """All steps, in order; small sizes on the CPU for `smoke`."""
    device = ("--device", "cpu" if smoke else "cuda")
    found = [
        Step(
            "checks", "the loss against float64", "tests/loss_on_device.py",
            (*device, *(("--wide", "211") if smoke else ())), 100, _checks,
        )
    ]  # fmt: skip
    # Compiling takes longer than all else together.
    without = ("--without", "naive_compiled")
    if smoke:
        without = (*without, "sparse_kl_per_token", "torch_linear_ce")
    small_loss = ("--tokens", "32", "--vocab", "997", "--kept", "8", "--repeats", "1")
    for hidden in (16,) if smoke else (_GOAL_HIDDEN, 1024, 4096):
        arguments = (*device, *without, "--hidden", str(hidden), *(small_loss if smoke else ()))
        name = f"hidden size {hidden}"
        found.append(Step("loss", name, "tools/bench_loss.py", arguments, 50, _loss))
    for shape in ("tiny",) if smoke else ("0.6b", "1.7b"):
        for tokens in (48,) if smoke else (8192, 4096):
            # One trace, so that a shorter lead span cannot fill its place with more of them. So
            # long a one has a row of its own, packing or not.
            arguments = (
                *device, "--shape", shape, "--tokens", str(tokens), "--traces", "1",
                "--lead-spans", "1.0", "0.5", *(() if smoke else ("0.25",)),
                "--repeats", "1" if smoke else "5",
            )  # fmt: skip
            name = f"Qwen3 {shape}, {tokens} tokens"
            found.append(Step("train", name, "tools/bench_train.py", arguments, 45, _train))
    small_moves = ("--tokens", "8000", "--groups", "2", "--repeats", "1")
    found.append(
        Step(
            "to-device", "teacher's rows to the device", "tools/bench_to_device.py",
            (*device, *(small_moves if smoke else ())), 30, _to_device,
        )
    )  # fmt: skip
    sizes = ("--num-prompts", "8", "--max-new-tokens", "24", "--rounds", "1", "--concurrency", "8")
    if not smoke:
        sizes = ("--shape", "qwen3-4b", "--num-prompts", "256", "--max-new-tokens", "256",
                 "--rounds", "2")  # fmt: skip
    found.append(
        Step(
            "capture", "tiny teacher" if smoke else "Qwen3-4B shape", "tools/bench_capture.py",
            (*sizes, "--ways", "bare,flat,fast"), 180, _capture,
            needs=("vllm", "zstandard"),
            # Where torch is not the one that vLLM asks for, its compiler passes are what breaks.
            if_failed=() if smoke else ("--eager",),
        )
    )  # fmt: skip
    engines = ("float32/float32",)
    if not smoke:
        engines = ("bfloat16/float32", "bfloat16/bfloat16", *engines)
    found.append(
        Step(
            "rows", "vLLM's rows against transformers", "tools/bench_rows.py",
            ("--num-prompts", "4" if smoke else "32", "--engines", *engines), 100, _rows,
            needs=("vllm",),
        )
    )  # fmt: skip
    return [_for_smoke(step) for step in found] if smoke else found


def _for_smoke(step: Step) -> Step:
    """Steps with time for a busy machine, without goals that were set for other sizes."""
    step = replace(step, limit_s=200)
    if step.part in ("checks", "rows"):  # what is right at one size is right at any
        return step
    return replace(
        step,
        figures=lambda result, figures=step.figures: [
            replace(figure, goal="", is_met=None) for figure in figures(result)
        ],
    )


def _at_most(what: str, value: float, goal: float, style: str = ".2f", unit: str = "") -> Figure:
    return Figure(what, f"{value:{style}}{unit}", f"<= {goal:.3g}{unit}", value <= goal)


def _at_least(what: str, value: float, goal: float, style: str = ".2f", unit: str = "") -> Figure:
    return Figure(what, f"{value:{style}}{unit}", f">= {goal:.3g}{unit}", value >= goal)


def _checks(result: Result) -> list[Figure]:
    kernels = Figure("kernels of the loss", result["kernels"])
    if result["device"] == "cuda":
        is_triton = result["kernels"] == "TritonPasses"
        kernels = replace(kernels, goal="TritonPasses", is_met=is_triton)
    figures = [kernels]
    for name, check in result["checks"].items():
        what = name.replace("_", " ")
        shown = check["error"]
        if shown is None:
            shown = f"right in {check['num_cases']} cases, worst {check['worst']:.1e}"
        figures.append(Figure(what, shown, "right", check["error"] is None))
    return figures


def _loss(result: Result) -> list[Figure]:
    (table,) = result["tables"].values()
    rows = table["rows"]
    ours = rows["sparse_kl"]
    size = f"{table['tokens']:,} x {table['hidden']:,}"
    is_goal = (table["hidden"], table["tokens"]) == (_GOAL_HIDDEN, _GOAL_TOKENS)
    gib = ours["peak_extra_bytes"] / GIB
    times = Figure(f"{size}: forward and backward", f"{ours['ms']:.1f} ms")
    memory = Figure(f"{size}: memory above the inputs", f"{gib:.2f} GiB")
    if is_goal:
        times = _at_most(times.what, ours["ms"], 27, ".1f", " ms")
        memory = _at_most(memory.what, gib, 1.9, ".2f", " GiB")
    figures = [
        times,
        memory,
        _at_most(f"{size}: time of plain CE's", ours["time_ratio_vs_plain_ce"], 1.05),
        _at_most(f"{size}: time of the dense formula's", ours["time_ratio_vs_naive"], 0.67),
        _at_most(
            f"{size}: gradient's error",
            ours["grad_rel_error"], 2 * rows["naive"]["grad_rel_error"], ".1e",
        ),
    ]  # fmt: skip
    if "liger_linear_kl" in rows:
        ratio = ours["ms"] / rows["liger_linear_kl"]["ms"]
        figures.append(_at_most(f"{size}: time of Liger's dense KL's", ratio, 0.67))
    return figures


def _train(result: Result) -> list[Figure]:
    figures, rows = [], {row["lead_span"]: row for row in result["rows"].values()}
    where = f"{result['shape']}, {result['tokens']:,} tokens"
    for lead_span, row in rows.items():
        figures.append(
            Figure(
                f"{where}, lead span {lead_span:g}",
                f"{row['step_s'] * 1e3:,.0f} ms, {row['tokens_per_s']:,.0f} tokens/s, "
                f"{row['peak_bytes'] / GIB:.1f} GiB; loss {row['loss_share']:.0%}, "
                f"data {row['data_share']:.1%}, optimizer {row['optimizer_share']:.0%}",
            )
        )
    if 0.5 in rows:
        half, whole = rows[0.5], rows[1.0]
        loss_ratio = half["loss_share"] * half["step_s"] / (whole["loss_share"] * whole["step_s"])
        figures += [
            _at_most(f"{where}: step at lead span 0.5", half["time_ratio"], 0.52),
            _at_most(f"{where}: activations at 0.5", half["memory_ratio_above_state"], 0.5),
            _at_most(f"{where}: loss at 0.5", loss_ratio, 0.55),
        ]
    return figures


def _to_device(result: Result) -> list[Figure]:
    figures = [
        Figure(
            f"padded on the {'CPU' if name == 'dense' else 'device'}",
            f"{row['tokens_per_s'] / 1e6:.2f} M tokens/s, CPU {row['busy_us_per_token']:.2f} "
            f"us/token, {row['bytes_per_token']:.0f} B/token",
        )
        for name, row in result["ways"].items()
    ]
    return [*figures, Figure("device over CPU", f"{result['ragged_over_dense']:.2f}")]


def _capture(result: Result) -> list[Figure]:
    where = f"{result['model']}, K = {result['top_k']}, {result['concurrency']} in flight"
    rates = [
        Figure(f"{where}: {way}", f"{result[f'tokens_per_s_{way}']:,.0f} tokens/s")
        for way in ("bare", "flat", "fast")
    ]
    return [
        *rates,
        _at_least(f"{where}: ours of bare vLLM", result["fast_over_bare"], 0.95),
        _at_least(f"{where}: ours of FlatLogprobs", result["fast_over_flat"], 1.0),
        _at_most(f"{where}: CPU per token", result["host_us_per_token_fast"], 6, ".1f", " us"),
    ]


def _rows(result: Result) -> list[Figure]:
    figures, divergences = [], {}
    for engine in result["engines"].values():
        name = f"{engine['dtype']}, head {engine['head_dtype']}"
        divergences[name] = max(engine[kind]["kl"] for kind in ("generated", "scored"))
        for kind in ("generated", "scored"):
            row = engine[kind]
            shown = (
                f"largest {row['largest']:.1e}, KL {row['kl']:.1e}, on grid {row['on_grid']:.0%}"
            )
            is_exact = engine["dtype"] == "float32"
            figures.append(
                Figure(
                    f"{name}, {kind}", shown, "largest <= 1e-3" if is_exact else "",
                    row["largest"] <= 1e-3 if is_exact else None,
                )
            )  # fmt: skip
    with_head, without = (
        divergences.get(f"bfloat16, head {head}") for head in ("float32", "bfloat16")
    )
    if with_head is not None and without is not None:
        figures.append(_at_most("KL, float32 head over bfloat16 head", with_head / without, 1.0))
    return figures
