"""Precision of a run: of its matrix products, of frozen weights, and of the student it writes."""

import logging
import os
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from student_train.run.config import TrainConfig

logger = logging.getLogger(__name__)

# What `accelerate launch` passes on; it says "no" too where nothing was configured.
_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
_DTYPE_OF_ACCELERATE = {"bf16": "bfloat16", "no": None}


def with_precision(config: TrainConfig) -> TrainConfig:
    """The configuration with its precision decided: asked for, configured for accelerate, or usual.

    Raises:
        ValueError: If accelerate is configured for a precision that runs do not have.
    """
    configured = os.environ.get(_ACCELERATE, "no")
    if config.dtype is not None:
        if _DTYPE_OF_ACCELERATE.get(configured, configured) not in (None, config.dtype):
            logger.warning(
                "products are in %s as --dtype says; accelerate is configured for %s",
                config.dtype, configured,
            )  # fmt: skip
        return config
    if configured not in _DTYPE_OF_ACCELERATE:
        raise ValueError(
            f"accelerate is configured for mixed precision {configured!r}, which no run has: give "
            "--dtype bfloat16 or float32"
        )
    return replace(config, dtype=_DTYPE_OF_ACCELERATE[configured] or usual_dtype())


def usual_dtype() -> str:
    """Name of the dtype of matrix products where none is asked for."""
    is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if is_fast else "float32"


def halve_frozen_layers(model: PreTrainedModel) -> None:
    """Keep frozen linear layers in bfloat16, in which autocast would multiply by them anyway.

    No product changes. Autocast would cast them at every use, and keep the casts for the backward
    pass beside them. Embeddings and norms stay as they are: they are no products.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
