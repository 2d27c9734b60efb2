"""Low-rank adapters (LoRA, arXiv 2106.09685) with `peft`: few weights beside frozen ones.

`peft` is imported where it is used: without adapters it need not be installed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.model.lora import Lora

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"  # every linear layer but the head and routers
# The routers of mixtures of experts: adapting them without a loss that balances the experts lets
# a few of them take every token.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def add_adapters(model: PreTrainedModel, lora: Lora) -> "PeftModel":
    """Freeze a model and add adapters; its outputs are unchanged until they are trained.

    Args:
        model: Model to train; changed in place.
        lora: Adapters to add.

    Returns:
        peft's wrapper, which can save the adapters or merge them into the model.

    Raises:
        ValueError: If a target is not a linear layer, or is the head, whose weight the loss takes.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if ALL_LINEAR not in lora.targets:
        _check_targets(model, lora.targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=ALL_LINEAR if ALL_LINEAR in lora.targets else list(lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(lora.seed)
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if not _ROUTERS.isdisjoint(name.split(".")):
            parameter.requires_grad = False  # an adapter begins as nothing, and stays that
    return adapted


def with_trained_adapters(
    model: PreTrainedModel, lora: Lora, weights: Mapping[str, Tensor], *, merged: bool
) -> "PreTrainedModel | PeftModel":
    """Rebuild the result of a run with adapters.

    Args:
        model: The whole student as it was before the run; changed in place.
        lora: Adapters, as in `add_adapters`.
        weights: Weights of the adapters, by their names in the model.
        merged: Whether to merge the adapters into the model's own weights.
    """
    adapted = add_adapters(model, lora)
    _, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise ValueError(f"no adapter of this student has the name {unexpected[0]}")
    return adapted.merge_and_unload() if merged else adapted


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"lora_targets: the student has no layer {target!r} that can be adapted; there are "
                f"{names}, and {ALL_LINEAR} for all of them"
            )


def count_trained(model: nn.Module) -> tuple[int, int]:
    """Number of weights that are trained, and of all weights."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
