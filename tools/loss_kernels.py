"""Kernels of the loss without a GPU: registers and spills on sm_90, launches, predicted times.

    python tools/loss_kernels.py                  # every divergence and tail, as Markdown tables
    python tools/loss_kernels.py --json FILE

Triton brings the assembler. Nothing is run on a GPU, so no time here is measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from loss_prediction import CARDS, predict
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from student_train.losses import (
    TeacherTargets,
    chunks,
    sparse_kl,
    triton_fused,
    triton_rows,
    triton_scale,
)
from student_train.losses.rows import Passes
from student_train.objective import DEFAULT_MIXES, DIVERGENCES, TAILS, Objective

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    "top_ids": "*i64", "target_ids": "*i64", "num_kept_of_rows": "*i64", "top1_out": "*i1",
    "stride": "i32", "out_stride": "i32", "gradient_stride": "i32", "kept_stride": "i32",
    "width": "i32", "num_vocab": "i32",
}  # fmt: skip
# What the launcher finds to be multiples of 16, beside addresses.
MULTIPLES = ("stride", "out_stride", "gradient_stride", "width")
DEFAULTS: dict[str, Any] = {
    "divergence": "forward_kl", "mix": None, "tail": "bucket", "temperature": 1.0,
    "ce_weight": 0.5, "logit_scale": 1.0, "softcap": None, "lanes": 64, "block": 8192,
    "bias": None,
}  # fmt: skip
# Names of operations that launch nothing: views and allocations.
_NUM_ROWS = 8  # of the calls whose launches are counted
FREE = (
    "view", "slice", "select", "t", "transpose", "detach", "alias", "unbind", "unsqueeze",
    "expand", "permute", "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view",
)  # fmt: skip


def compiled(
    kernel: JITFunction, logits_type: str, gradient_type: str, **settings: object
) -> CompiledKernel:
    """A kernel of the loss for sm_90, for logits and gradients of these types."""
    types = {**TYPES, "gradients": f"*{gradient_type}", "out": f"*{gradient_type}"}
    constants = {
        name: value for name, value in {**DEFAULTS, **settings}.items() if name in kernel.arg_names
    }
    signature = {name: types.get(name, f"*{logits_type}") for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in MULTIPLES
    }
    with warnings.catch_warnings():  # Triton says so of a default of its own
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
        return triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=HOPPER,
            options={"num_warps": triton_fused.NUM_WARPS, "num_stages": 1},
        )


def resources(binary: CompiledKernel) -> dict[str, int]:
    """Registers per thread, bytes spilled and bytes of shared memory, as the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(binary.asm["ptx"])
        done = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{source}.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stderr + done.stdout
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return {
        "registers": int(registers),
        "spill_bytes": sum(spilled),
        "shared_bytes": binary.metadata.shared,
    }


def objectives() -> Iterator[Objective]:
    """Every divergence with every tail that is allowed."""
    for divergence, tail in itertools.product(DIVERGENCES, TAILS):
        try:
            yield Objective(divergence=divergence, tail=tail)
        except ValueError:  # no divergence, or infinite
            continue


def kernel_table() -> list[dict[str, Any]]:
    """One row per kernel."""
    rows = []

    def add(name: str, kernel: JITFunction, **settings: object) -> None:
        found = resources(compiled(kernel, "fp32", "bf16", **settings))
        rows.append({"kernel": name, **found})

    for objective in objectives():
        name = f"fused: {objective.divergence}, {objective.tail}"
        mix = DEFAULT_MIXES.get(objective.divergence)
        settings = {"divergence": objective.divergence, "mix": mix, "tail": objective.tail}
        add(name, triton_fused._evaluate_row, **settings)
    wide = {"divergence": "jsd", "mix": 0.5}
    add("fused: jsd, 256 kept", triton_fused._evaluate_row, lanes=256, **wide)
    add("fused: jsd, 1024 kept", triton_fused._evaluate_row, lanes=1024, **wide)
    add(
        "fused: jsd, renormalise, temperature, softcap, scale", triton_fused._evaluate_row,
        tail="renormalise", temperature=2.0, softcap=30.0, logit_scale=0.5, **wide,
    )  # fmt: skip
    add("fused: forward_kl, no gradients", triton_fused._evaluate_row,
        gradients=None, row_weights=None)  # fmt: skip
    add("passes: sums of the tail", triton_rows._sum_tails)
    add("passes: gradient", triton_rows._weight_softmax)
    return rows


class _Launches(TorchDispatchMode):
    """Counts operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _count(counts: Counter[str], name: str, *_: object, **__: object) -> None:
    counts[name] += 1


@contextmanager
def _counted_kernels(passes: type[Passes], counts: Counter[str]) -> Iterator[None]:
    """Count launches of our kernels instead of starting them; the loss is then garbage."""
    places = [(triton_fused, "_evaluate_row"), (triton_rows, "_sum_tails"),
              (triton_rows, "_weight_softmax"), (triton_scale, "_multiply")]  # fmt: skip
    kept = [(module, name, getattr(module, name)) for module, name in places]
    chosen: Callable[..., type[Passes]] = chunks.passes_type
    for module, name in places:
        count = functools.partial(_count, counts, f"kernel {name}")
        setattr(module, name, {(num_rows,): count for num_rows in range(_NUM_ROWS + 1)})
    chunks.passes_type = lambda device_type: passes  # type: ignore[assignment]
    try:
        yield
    finally:
        chunks.passes_type = chosen
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def launches_per_chunk(passes: type[Passes], objective: Objective) -> Counter[str]:
    """What one more chunk launches, found from calls with 2 and 4 of them.

    In float32, so that each chunk has its own products of the backward; with bfloat16 operands
    the fused kernel shares these two among `CHUNKS_PER_PRODUCT` chunks.
    """
    totals = []
    for num_chunks in (2, 4):
        num_rows, num_vocab, counts = _NUM_ROWS, 15, Counter[str]()
        hidden, weight = torch.ones(num_rows, 4), torch.ones(num_vocab, 4)
        targets = TeacherTargets(
            top_ids=torch.arange(3).expand(num_rows, 3),
            top_logits=-torch.arange(3.0).expand(num_rows, 3),
            k=torch.full((num_rows,), 3), tail_logit=torch.zeros(num_rows),
            target_ids=torch.zeros(num_rows, dtype=torch.int64),
        )  # fmt: skip
        row_bytes = passes.row_bytes(objective, 16, torch.float32, torch.float32)
        with _counted_kernels(passes, counts), _Launches() as mode:
            sparse_kl(
                hidden.requires_grad_(), weight.requires_grad_(), targets,
                torch.ones(num_rows), objective,
                chunk_bytes=row_bytes * (num_rows // num_chunks), has_zero_weights=False,
            ).loss.backward()  # fmt: skip
        totals.append(mode.counts + counts)
    more = totals[1] - totals[0]
    return Counter({name: count // 2 for name, count in more.items()})


class PassesAlone(triton_rows.TritonPasses):
    """The way before there was a fused kernel, and of a vocabulary that is split."""

    max_fused_kept = 0


def launch_table() -> list[dict[str, Any]]:
    """Launches of one more chunk, for some objectives, both ways."""
    rows = []
    for name, settings in (
        ("forward_kl", {}),
        ("jsd", {"divergence": "jsd"}),
        ("forward_kl, softcap, scale", {"softcap": 30.0, "logit_scale": 0.5}),
    ):
        objective = Objective(**settings)
        before = launches_per_chunk(PassesAlone, objective)
        after = launches_per_chunk(triton_rows.TritonPasses, objective)
        rows.append({
            "objective": name, "before": before.total(), "after": after.total(),
            "after_names": dict(after),
        })  # fmt: skip
    return rows


def prediction_table() -> list[dict[str, Any]]:
    """Predicted milliseconds of forward and backward per card and size."""
    rows = []
    for (card, ceilings), hidden in itertools.product(CARDS.items(), (1024, 2048, 4096)):
        found = predict(ceilings, tokens=8192, hidden=hidden, vocab=151_936)
        rows.append({
            "card": card, "hidden": hidden,
            "products_ms": [round(ms, 1) for ms in found.products_ms],
            "row_kernel_ms": round(found.sweeps_ms, 1),
            "weight_gradient_ms": round(found.weight_gradient_ms, 1),
            "cast_ms": round(found.cast_ms, 1),
            "total_ms": [round(ms, 1) for ms in found.range_ms],
            "extra_gib": round(found.extra_gib, 2),
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with a column per key."""

    def cell(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {count}" for name, count in value.items())
        return " to ".join(map(str, value)) if isinstance(value, list) else str(value)

    names = list(rows[0])
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[cell(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tables = {
        "launches per chunk": launch_table(),
        "8,192 tokens, vocabulary 151,936, bfloat16, predicted": prediction_table(),
        f"compiled for sm_90 by Triton {triton.__version__}": kernel_table(),
    }
    for title, rows in tables.items():
        print(f"{title}\n\n{markdown(rows)}\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
