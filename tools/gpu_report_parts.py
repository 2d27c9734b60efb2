"""Steps of gpu_report.py, and the figures and goals read from their results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loss_prediction import CARDS, predict

GIB = 2**30
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    what: str
    value: str  # as it is shown
    goal: str = ""
    is_met: bool | None = None  # None where there is no goal
    predicted: str = ""  # before anything was measured
    meaning: str = ""  # of a goal that is missed


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
# What fits into one call of 9 minutes at the steps' limits.
CALLS = {"1": (*PARTS[:4], "step"), "2": PARTS[4:]}
_GOAL_HIDDEN, _GOAL_TOKENS = 2048, 8192
# Milliseconds of forward and backward at this size; the H100's memory is slower.
_GOAL_MS = {"H200": 25.0, "H100": 27.0}
_GOAL_GIB = 2.1
# vLLM's share of its own speed that a capture keeps at 256 sequences.
_GOAL_OF_BARE = {"qwen3-4b": 0.97, "qwen3-1.7b": 0.95}
# On CUDA attention in float32 runs in TensorFloat-32, whose products have 10 bits of mantissa.
_LARGEST_FLOAT32, _LARGEST_TF32 = 1e-3, 3e-3


def card_of(device: str) -> str | None:
    """The card that goals were set for, from the name that its driver gives."""
    return next((name for name in CARDS if name in device), None)


def steps(*, smoke: bool, card: str | None = None) -> list[Step]:
    """All steps, in order, with the goals of a card; small sizes on the CPU for `smoke`."""
    found = _smoke_steps() if smoke else _full_steps(card)
    return [_for_smoke(step) for step in found] if smoke else found


def _full_steps(card: str | None) -> list[Step]:
    cuda = ("--device", "cuda")
    loss = functools.partial(_loss, card=card)
    found = [Step("checks", "the loss against float64", "tests/loss_on_device.py", cuda, 150,
                  _checks)]  # fmt: skip
    for hidden in (_GOAL_HIDDEN, 1024, 4096):
        # Compiling the dense formula takes longer than all else together.
        arguments = (*cuda, "--without", "naive_compiled", "--hidden", str(hidden))
        name = f"hidden size {hidden}"
        found.append(Step("loss", name, "tools/bench_loss.py", arguments, 38, loss))
    for tokens in (8192, 4096):
        # One trace, so that a shorter lead span cannot fill its place with more of them. So long a
        # one has a row of its own, packing or not.
        arguments = (*cuda, "--shape", "1.7b", "--tokens", str(tokens), "--traces", "1",
                     "--lead-spans", "1.0", "0.5", "0.25", "--repeats", "5")  # fmt: skip
        name = f"Qwen3 1.7b, {tokens} tokens"
        found.append(Step("train", name, "tools/bench_train.py", arguments, 50, _train))
    found.append(
        Step(
            "to-device",
            "teacher's rows to the device",
            "tools/bench_to_device.py",
            cuda,
            25,
            _to_device,
        )
    )
    for shape, limit_s in (("qwen3-4b", 220), ("qwen3-1.7b", 150)):
        sizes = ("--shape", shape, "--num-prompts", "256", "--max-new-tokens", "256",
                 "--rounds", "2", "--ways", "bare,flat,fast")  # fmt: skip
        found.append(
            Step(
                "capture", f"{shape} shape", "tools/bench_capture.py", sizes, limit_s, _capture,
                needs=("vllm", "zstandard"),
                # Where torch is not the one that vLLM asks for, its compiler passes break first.
                if_failed=("--eager",),
            )
        )  # fmt: skip
    engines = ("bfloat16/float32", "bfloat16/bfloat16", "float32/float32")
    found.append(
        Step(
            "rows", "vLLM's rows against transformers", "tools/bench_rows.py",
            ("--num-prompts", "32", "--engines", *engines), 170,
            functools.partial(_rows, largest=_LARGEST_TF32), needs=("vllm",),
        )
    )  # fmt: skip
    return found


def _smoke_steps() -> list[Step]:
    cpu = ("--device", "cpu")
    without = ("--without", "naive_compiled", "sparse_kl_per_token", "torch_linear_ce")
    small = (
        "--tokens",
        "32",
        "--vocab",
        "997",
        "--kept",
        "8",
        "--repeats",
        "1",
        "--hidden",
        "16",
        "--no-memory",
    )
    trace = ("--shape", "tiny", "--tokens", "48", "--traces", "1", "--lead-spans", "1.0", "0.5",
             "--repeats", "1", "--no-memory")  # fmt: skip
    moves = ("--tokens", "8000", "--groups", "2", "--repeats", "1")
    prompts = ("--num-prompts", "8", "--max-new-tokens", "24", "--rounds", "1", "--concurrency",
               "8", "--ways", "bare,flat,fast")  # fmt: skip
    engine = ("--num-prompts", "4", "--engines", "float32/float32")
    rows = functools.partial(_rows, largest=_LARGEST_FLOAT32)
    return [
        Step("checks", "the loss against float64", "tests/loss_on_device.py",
             (*cpu, "--wide", "211"), 60, _checks),
        Step("loss", "small", "tools/bench_loss.py", (*cpu, *without, *small), 60, _loss),
        Step("train", "tiny", "tools/bench_train.py", (*cpu, *trace), 60, _train),
        Step("to-device", "small", "tools/bench_to_device.py", (*cpu, *moves), 60, _to_device),
        Step("capture", "tiny teacher", "tools/bench_capture.py", prompts, 60, _capture,
             needs=("vllm", "zstandard")),
        Step("rows", "tiny teacher", "tools/bench_rows.py", engine, 60, rows, needs=("vllm",)),
    ]  # fmt: skip


def _for_smoke(step: Step) -> Step:
    """Steps with time for a busy machine, without goals that were set for other sizes."""
    step = replace(step, limit_s=200)
    if step.part in ("checks", "rows"):  # what is right at one size is right at any
        return step
    return replace(
        step,
        figures=lambda result, figures=step.figures: [
            replace(figure, goal="", is_met=None, predicted="") for figure in figures(result)
        ],
    )


def _at_most(
    what: str, value: float, goal: float, style: str = ".2f", unit: str = "", **said: str
) -> Figure:
    return Figure(
        what, f"{value:{style}}{unit}", f"<= {goal:.3g}{unit}", is_met=value <= goal, **said
    )


def _at_least(
    what: str, value: float, goal: float, style: str = ".2f", unit: str = "", **said: str
) -> Figure:
    return Figure(
        what, f"{value:{style}}{unit}", f">= {goal:.3g}{unit}", is_met=value >= goal, **said
    )


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


def _loss(result: Result, card: str | None = None) -> list[Figure]:
    """Figures of one size; of a bench that was stopped, those that it had."""
    (table,) = result["tables"].values()
    rows = table["rows"]
    ours, others = rows["sparse_kl"], {name: row["ms"] for name, row in rows.items()}
    size = f"{table['tokens']:,} x {table['hidden']:,}"
    figures = [_loss_time(f"{size}: forward and backward", table, ours["ms"], card)]
    for name, what, goal, meaning in (
        ("chunked_ce", "plain CE's", 1.05, "the kept entries cost more than their bytes: fewer "
         "warps a program, or fewer registers, let more rows run at once"),
        ("naive", "the dense formula's", 0.67, "the products are slow: chunks are too small"),
        ("liger_linear_kl", "Liger's dense KL's", 0.67, "as above"),
    ):  # fmt: skip
        if name in others:
            ratio = ours["ms"] / others[name]
            figures.append(_at_most(f"{size}: time of {what}", ratio, goal, meaning=meaning))
    if ours.get("peak_extra_bytes") is not None:
        gib, what = ours["peak_extra_bytes"] / GIB, f"{size}: memory above the inputs"
        is_goal = (table["hidden"], table["tokens"]) == (_GOAL_HIDDEN, _GOAL_TOKENS)
        figures.append(
            _at_most(what, gib, _GOAL_GIB, ".2f", " GiB", meaning="a buffer is there twice")
            if is_goal else Figure(what, f"{gib:.2f} GiB")
        )  # fmt: skip
    if ours.get("grad_rel_error") is not None:
        allowed = 2 * rows["naive"]["grad_rel_error"]
        figures.append(
            _at_most(
                f"{size}: gradient's error", ours["grad_rel_error"], allowed, ".1e",
                meaning="a sum is rounded that should not be: the kernel is wrong, or addmm is",
            )
        )  # fmt: skip
    return figures


def _loss_time(what: str, table: Result, ms: float, card: str | None) -> Figure:
    """The time, beside a card's prediction and goal."""
    figure = Figure(what, f"{ms:.1f} ms")
    if card is None or table["dtype"] != "bfloat16":
        return figure
    sizes = {name: int(table[name]) for name in ("tokens", "hidden", "vocab")}
    best, worst = predict(CARDS[card], **sizes).range_ms
    predicted = f"{best:.1f} to {worst:.1f} ms"
    if (sizes["hidden"], sizes["tokens"]) != (_GOAL_HIDDEN, _GOAL_TOKENS):
        return replace(figure, predicted=predicted)
    return _at_most(
        what, ms, _GOAL_MS[card], ".1f", " ms", predicted=predicted,
        meaning="where plain CE's time is as long, the products are below 700 TF/s or their "
        "float32 sum is not hidden behind them; where it is not, the row kernel is below the "
        "card's bandwidth",
    )  # fmt: skip


def _train(result: Result) -> list[Figure]:
    """Figures of one size; of a bench that was stopped, those that it had."""
    figures, rows = [], {row["lead_span"]: row for row in result["rows"].values()}
    where = f"{result['shape']}, {result['tokens']:,} tokens"
    for lead_span, row in rows.items():
        shown = f"{row['step_s'] * 1e3:,.0f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        if "peak_bytes" in row:
            shown += f", {row['peak_bytes'] / GIB:.1f} GiB"
        if "loss_share" in row:
            shown += (
                f"; loss {row['loss_share']:.0%}, data {row['data_share']:.1%}, "
                f"optimizer {row['optimizer_share']:.0%}"
            )
        figures.append(Figure(f"{where}, lead span {lead_span:g}", shown))
    if 0.5 not in rows:
        return figures
    half, whole = rows[0.5], rows[1.0]
    figures.append(
        _at_most(
            f"{where}: step at lead span 0.5", half["time_ratio"], 0.52,
            meaning="what a step costs whatever its length, the optimizer first, is more than 2 %",
        )
    )  # fmt: skip
    if "memory_ratio_above_state" in half:
        figures.append(
            _at_most(
                f"{where}: activations at 0.5", half["memory_ratio_above_state"], 0.5,
                meaning="something beside activations grows: the head's gradient and buffers do",
            )
        )  # fmt: skip
    if "loss_share" in half:
        loss_ratio = half["loss_share"] * half["step_s"] / (whole["loss_share"] * whole["step_s"])
        figures.append(_at_most(f"{where}: loss at 0.5", loss_ratio, 0.55))
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
    figures = [
        Figure(f"{where}: {name.removeprefix('tokens_per_s_')}", f"{rate:,.0f} tokens/s")
        for name, rate in result.items()
        if name.startswith("tokens_per_s_")
    ]
    goal = _GOAL_OF_BARE.get(result["model"], 0.92)
    return [
        *figures,
        _at_least(
            f"{where}: ours of bare vLLM", result["fast_over_bare"], goal,
            predicted="0.98 to 0.99" if goal == _GOAL_OF_BARE["qwen3-4b"] else "0.96 or more",
            meaning="at 0.90 to 0.93 (4B) or 0.75 to 0.85 (1.7B) the engine's own logprobs were "
            "used: the rows were not taken in the worker; a little below the goal, the kernel "
            "that finds the top-k is slower than two reads of the logits",
        ),
        _at_least(f"{where}: ours of FlatLogprobs", result["fast_over_flat"], 1.0),
        _at_most(
            f"{where}: CPU per token", result["host_us_per_token_fast"], 4, ".1f", " us",
            meaning="hidden behind a step of the engine while that takes over 1 ms; else it is "
            "what bounds small teachers",
        ),
    ]  # fmt: skip


def _rows(result: Result, largest: float) -> list[Figure]:
    figures, divergences = [], {}
    for engine in result["engines"].values():
        name = f"{engine['dtype']}, head {engine['head_dtype']}"
        divergences[name] = max(engine[kind]["kl"] for kind in ("generated", "scored"))
        for kind in ("generated", "scored"):
            row, what = engine[kind], f"{name}, {kind}"
            shown = (
                f"largest {row['largest']:.1e}, KL {row['kl']:.1e}, on grid {row['on_grid']:.0%}"
            )
            if engine["dtype"] != "float32":
                figures.append(Figure(what, shown))
                continue
            figures.append(
                Figure(
                    what, shown, f"largest <= {largest:g}", is_met=row["largest"] <= largest,
                    meaning="rounding of products cannot do that: the rows are shifted, or the "
                    "head is not float32",
                )
            )  # fmt: skip
    with_head, without = (
        divergences.get(f"bfloat16, head {head}") for head in ("float32", "bfloat16")
    )
    if with_head is not None and without is not None:
        figures.append(
            _at_most(
                "KL, float32 head over bfloat16 head", with_head / without, 1.0,
                meaning="the head's dtype was not taken up by the engine",
            )
        )  # fmt: skip
    return figures
