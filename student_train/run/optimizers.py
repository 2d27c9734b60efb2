"""Optimizers and schedules by name."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import get_scheduler
from transformers.optimization import Adafactor

# Packages with 8-bit AdamW; the first that is installed is used.
_EIGHT_BIT = ("torchao.optim", "bitsandbytes.optim")


def make_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make an optimizer over the parameters that are trained.

    Args:
        name: One of `config.OPTIMIZERS`.
        model: Model on the device where it will be trained.
        lr: Peak learning rate, absolute for all optimizers.
        weight_decay: Weight decay of matrices; norms and biases do not decay.

    Raises:
        ValueError: If its package is not installed.
    """
    groups = _parameter_groups(model, weight_decay)
    if name == "adamw":
        # The fused kernel reads and writes everything once; the usual one on CUDA also holds a
        # tensor as large as all weights. On the CPU it serves weights that stay there beside a GPU.
        fused = True if torch.cuda.is_available() else None
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    optimizer: torch.optim.Optimizer
    if name == "adafactor":
        optimizer = Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
        return optimizer
    for module in _EIGHT_BIT:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            optimizer = importlib.import_module(module).AdamW8bit(groups, lr=lr)
            return optimizer
    wanted = " or ".join(module.partition(".")[0] for module in _EIGHT_BIT)
    raise ValueError(f"optimizer {name}: needs {wanted}; pip install torchao")


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup: float, num_steps: int
) -> LRScheduler:
    """Make the learning rate schedule of a run, one `step()` per step of the optimizer.

    Args:
        name: One of `config.SCHEDULES`. "onecycle" is torch's `OneCycleLR`: from a 25th of the
            peak up and down to almost nothing along cosines, AdamW's first beta the other way.
        optimizer: Optimizer, with the peak learning rate.
        warmup: Proportion of the steps in which the rate rises.
        num_steps: Number of steps of the run.
    """
    if name == "onecycle":
        num_cycle = max(3, num_steps)  # neither of its two phases may be empty
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=num_cycle,
            pct_start=min(1 - 1 / num_cycle, max(warmup, 2 / num_cycle)),
            cycle_momentum="betas" in optimizer.defaults,
        )
    schedule: LRScheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=round(warmup * num_steps),
        num_training_steps=num_steps,
    )
    return schedule


def _parameter_groups(model: nn.Module, weight_decay: float) -> Sequence[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
