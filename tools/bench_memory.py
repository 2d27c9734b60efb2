"""Memory of a step, predicted against counted, and what fits where; shapes only, no device.

    python tools/bench_memory.py --json memory.json

predicted: what `train-student run --estimate` says, for Qwen3 shapes in bfloat16 on a CPU, whose
buffers for logits are smaller.
counted: the largest number of bytes that live at once in a real step of two passes on fake tensors
(forward, loss, backward, AdamW), which are seen where torch makes them.
fits: tokens of the largest forward pass that fits a card, by the prediction for CUDA, with gradient
checkpointing and 2 GiB left for CUDA, libraries and the allocator's slack.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_json import write_figures
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from student_train.losses import TeacherTargets, sparse_kl
from student_train.model.adapters import add_adapters
from student_train.model.load import output_layer
from student_train.run.config import TrainConfig
from student_train.run.memory_estimate import estimate, give_memory
from student_train.run.precision import halve_frozen_layers

GIB = 2**30
# Hidden size, intermediate size, layers, attention heads, tied embeddings.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA 16, checkpointing": {"gradient_checkpointing": True, "lora_rank": 16},
}
CARDS_GIB = {"24 GB": 23.6, "40 GB": 39.4, "80 GB": 79.1, "141 GB": 139.8}
LEFT_GIB = 2.0
FITS: dict[str, tuple[int, dict[str, Any]]] = {
    "all weights, 1 GPU": (1, {}),
    "all weights, 8 GPUs": (8, {"sharding": "full"}),
    "LoRA 16, 1 GPU": (1, {"lora_rank": 16}),
    "LoRA 16, 8 GPUs": (8, {"lora_rank": 16, "sharding": "full"}),
}
LARGEST_PASS, SMALLEST_PASS = 131_072, 1024
NUM_KEPT = 16  # entries per token, a usual mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the forward pass")
    parser.add_argument("--students", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'student':8}{'run':25}{'predicted':>10}{'counted':>9}{'ratio':>7}   GiB")
    for student in arguments.students:
        for layout, changes in LAYOUTS.items():
            config = config_of(changes)
            found = estimate(shape_of(student), config, num_tokens=arguments.tokens, is_cuda=False)
            predicted = found.total
            counted = counted_peak(shape_of(student), config, arguments.tokens)
            rows.append({"name": f"{student} {layout}", "predicted": predicted, "counted": counted})
            print(
                f"{student:8}{layout:25}{predicted / GIB:10.1f}{counted / GIB:9.1f}"
                f"{predicted / counted:7.2f}   {found}",
                flush=True,
            )
    print(f"\n{'student':8}{'run':25}{''.join(f'{card:>9}' for card in CARDS_GIB)}   tokens")
    fits = []
    for student in arguments.students:
        for name in FITS:
            found = largest_passes(student, name)
            fits.append({"name": f"{student} {name}", **found})
            cells = "".join(f"{size or '-':>9}" for size in found.values())
            print(f"{student:8}{name:25}{cells}", flush=True)
    write_figures(arguments.json, {"tokens": arguments.tokens, "rows": rows, "fits": fits})


def shape_of(student: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, tied = SHAPES[student]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=tied, max_position_embeddings=LARGEST_PASS,
    )  # fmt: skip


def config_of(changes: dict[str, Any]) -> TrainConfig:
    settings = {"cache": ("cache",), "student": "student", "out": Path("run"), "dtype": "bfloat16"}
    return TrainConfig(**settings | changes)


def largest_passes(student: str, name: str) -> dict[str, int]:
    """Tokens of the largest pass that fits each card, a multiple of 1,024; 0 if none does."""
    num_processes, changes = FITS[name]
    config = config_of({"gradient_checkpointing": True} | changes)
    one, two = (
        estimate(shape_of(student), config, num_tokens=n, num_processes=num_processes)
        for n in (SMALLEST_PASS, 2 * SMALLEST_PASS)
    )
    per_token = (two.total - one.total) / SMALLEST_PASS
    found = {}
    for card, size_gib in CARDS_GIB.items():
        room = (size_gib - LEFT_GIB) * GIB - (one.total - per_token * SMALLEST_PASS)
        size = int(room / per_token) // SMALLEST_PASS * SMALLEST_PASS
        found[card] = max(0, min(LARGEST_PASS, size))
    return found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from first use to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation, and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it ends."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            weakref.finalize(storage, self._end, key, size)
            self._live += size
            self.peak = max(self.peak, self._live)

    def _end(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._live -= size


def counted_peak(shape: Qwen3Config, config: TrainConfig, num_tokens: int) -> int:
    """Most bytes alive at once in a step after the first."""
    AttentionInterface.register("causal", causal_attention)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
    model.set_attn_implementation("causal")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        add_adapters(model, config.lora)
        halve_frozen_layers(model)
    with FakeTensorMode():
        give_memory(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        # As the fused kernel, which makes no temporary tensor.
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        targets, weight = targets_of(num_tokens), torch.ones(num_tokens)
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.count(tensor)
        with live:
            for parameter in trained:  # makes the optimizer's state, as an earlier step has
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            for _ in range(2):  # gradients of the first are there while the second runs
                run_pass(model, ids, targets, weight)
            optimizer.step()
    return live.peak


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    **_others: object,
) -> tuple[torch.Tensor, None]:
    """Attention as on a GPU: for fake tensors `transformers` would make a mask of all pairs."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def targets_of(num_tokens: int) -> TeacherTargets:
    return TeacherTargets(
        top_ids=torch.zeros(num_tokens, NUM_KEPT, dtype=torch.int64),
        top_logits=torch.zeros(num_tokens, NUM_KEPT),
        k=torch.full((num_tokens,), NUM_KEPT),
        tail_logit=torch.zeros(num_tokens),
        target_ids=torch.zeros(num_tokens, dtype=torch.int64),
    )


def run_pass(
    model: PreTrainedModel, ids: torch.Tensor, targets: TeacherTargets, weight: torch.Tensor
) -> None:
    """Forward, loss and backward; the body's output lives no longer than in a run."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        output = sparse_kl(
            hidden.flatten(0, 1), output_layer(model).weight, targets, weight,
            has_zero_weights=False,
        )  # fmt: skip
    output.loss.backward()


if __name__ == "__main__":
    main()
