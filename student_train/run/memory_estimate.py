"""Memory that a run will need on each device, predicted without loading a weight.

What autograd keeps for the backward pass is counted, not modelled: the student runs on fake tensors
with one layer and with two, under the run's precision.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from student_train.data.draw import DrawnSpans, draw_spans
from student_train.data.traces import open_data
from student_train.losses.chunks import CHUNK_BYTES, CUDA_CHUNK_BYTES
from student_train.model.adapters import add_adapters
from student_train.model.load import decoder_layers, output_layer
from student_train.model.lora import Lora
from student_train.run.config import TrainConfig
from student_train.run.precision import halve_frozen_layers, with_precision

_PROBE_TOKENS = 64
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1}  # per trained weight
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_PROCESSES = {"none": "WORLD_SIZE", "full": "WORLD_SIZE", "hybrid": "LOCAL_WORLD_SIZE"}
_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at their peak."""

    weights: int  # with their copies in half precision
    gradients: int
    optimizer: int
    activations: int
    loss: int  # buffers for logits, and the head's gradient in float32

    @property
    def total(self) -> int:
        """Sum of the parts; the allocator's slack and libraries come on top, about a GiB."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "loss")
        listed = ", ".join(f"{name} {getattr(self, name) / _GIB:.1f}" for name in parts)
        return f"{self.total / _GIB:.1f} GiB per device: {listed}"


def estimate_run(config: TrainConfig) -> str:
    """One line on a run's memory, and on how to shrink it; the run's folder is not touched.

    The number of processes is the launcher's.

    Raises:
        CacheError: If a cache cannot be read.
        ValueError: If the settings do not fit the cache, or the student cannot be loaded.
    """
    config = with_precision(config)
    data = open_data(
        config.cache, where=config.where, trace_fields=config.trace_fields,
        heldout_share=config.heldout_share, allow_unsealed=config.allow_unsealed,
    )  # fmt: skip
    drawn = [draw_spans(source, config.selection, config.seed) for source in data.sources]
    try:
        shape = AutoConfig.from_pretrained(config.student, revision=config.student_revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {config.student!r} cannot be loaded: {reason}") from error
    return estimate_line(config, shape, drawn)


def estimate_line(config: TrainConfig, shape: PreTrainedConfig, drawn: Sequence[DrawnSpans]) -> str:
    """The line of `estimate_run` for a student of that shape and tokens that were drawn.

    Raises:
        ValueError: If it cannot be predicted; the error says why.
    """
    if config.live_teacher is not None:
        raise ValueError("a live teacher is in memory too: not predicted")
    longest = max(int(one.num_read.max(initial=0)) for one in drawn)
    found = estimate(
        shape, config,
        num_tokens=math.ceil(max(longest, config.batch_tokens) / config.context_parallel),
        num_processes=int(os.environ.get(_PROCESSES[config.sharding]) or 1),
        is_cuda=torch.cuda.is_available(),
    )  # fmt: skip
    remedies = ["lower --batch-tokens"] if config.batch_tokens > longest else ["lower --lead-span"]
    if not config.gradient_checkpointing:
        remedies.append("--gradient-checkpointing")
    if config.sharding == "none":
        remedies.append("--sharding full on several processes")
    elif not config.offload:
        remedies.append("--offload")
    if config.context_parallel == 1 and config.batch_tokens <= longest:
        remedies.append("--context-parallel 2 on several processes")
    if config.optimizer == "adamw" and config.sharding == "none":
        remedies.append("--optimizer adamw8bit")
    if config.lora_rank is None:
        remedies.append("--lora-rank 16")
    return f"{found}. To shrink it: {'; '.join(remedies)}"


def estimate(
    shape: PreTrainedConfig,
    config: TrainConfig,
    *,
    num_tokens: int,
    num_processes: int = 1,
    is_cuda: bool = True,
) -> MemoryEstimate:
    """Predict a run's memory.

    Args:
        shape: The student's configuration.
        config: Configuration of the run, with its precision decided.
        num_tokens: Tokens of the largest forward pass.
        num_processes: Number of processes that --sharding splits over.
        is_cuda: Whether they run on GPUs, with attention that keeps no scores.

    Raises:
        ValueError: If the student is a mixture of experts, or cannot run on fake tensors.
    """
    text = shape.get_text_config()
    if any(getattr(text, name, None) for name in _EXPERTS):
        raise ValueError(
            "a mixture of experts keeps in memory what its routing asks for: not predicted"
        )
    is_half = config.dtype == "bfloat16"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    head = output_layer(model).weight
    num_layers, num_root = _weights_of_parts(model)
    if config.lora is not None:
        add_adapters(model, config.lora)
        if is_half:
            halve_frozen_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    parts = num_processes if config.sharding != "none" else 1
    weights = (trained * 4 + frozen_bytes) // parts
    gradients = trained * 4 // parts
    if config.sharding != "none":  # the root and two layers are whole, the root's gradients too
        num_bytes = 2 if is_half else 4
        of_root = num_root * num_bytes if head.requires_grad else 0
        if config.offload:
            weights = gradients = 0
        weights += (num_root + 2 * num_layers) * num_bytes
        gradients += of_root
    elif is_half:
        weights += 2 * trained  # autocast keeps copies through a step's forward and backward
    try:
        rest, per_layer = (
            counted_activations(shape, n, _PROBE_TOKENS, is_half=is_half, lora=config.lora)
            for n in (1, 2)
        )
    except (RuntimeError, AttributeError, LookupError, TypeError, NotImplementedError) as error:
        # Code of any model, which may look into its tensors; the run itself needs no prediction.
        reason = " ".join(str(error).split())
        raise ValueError(f"not predicted, the student needs real tensors: {reason}") from error
    per_layer, rest = per_layer - rest, 2 * rest - per_layer
    count = text.num_hidden_layers
    if config.gradient_checkpointing:  # the input of each layer, and one layer at a time
        per_token = rest + per_layer + count * 4 * head.shape[1] * _PROBE_TOKENS
    else:
        per_token = rest + per_layer * count
    # One chunk of logits, and the gradients of the head's weight: float32, then as it is used.
    head_bytes = head.numel() * (4 + (2 if is_half else 0)) if head.requires_grad else 0
    if is_half and not head.requires_grad and head.dtype == torch.float32:
        head_bytes = 2 * head.numel()  # tied to an embedding, it is cast for the loss
    if is_half and not head.requires_grad and not is_cuda:  # see `HeadProducts`
        widened = 4 * head.numel()
        if config.gradient_checkpointing:  # gone before the one layer's activations are there
            widened = max(0, widened - per_layer * num_tokens // _PROBE_TOKENS)
        head_bytes += widened
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=0 if config.offload else int(_STATE_BYTES[config.optimizer] * trained) // parts,
        activations=per_token * num_tokens // _PROBE_TOKENS,
        loss=(CUDA_CHUNK_BYTES if is_cuda else CHUNK_BYTES) + head_bytes,
    )


def _weights_of_parts(model: Any) -> tuple[int, int]:  # noqa: ANN401 (any class of transformers)
    """Weights of the largest layer, and of everything outside layers."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    return max(layers), sum(p.numel() for p in model.parameters()) - sum(layers)


def counted_activations(
    shape: PreTrainedConfig,
    num_layers: int,
    num_tokens: int,
    *,
    is_half: bool,
    lora: Lora | None = None,
) -> int:
    """Bytes that the body keeps for its backward pass, counted on fake tensors of that shape."""
    text = shape.get_text_config()
    fields = {**text.to_dict(), "num_hidden_layers": num_layers}
    if fields.get("layer_types") is not None:
        fields["layer_types"] = (fields["layer_types"] * num_layers)[:num_layers]
    kept: dict[int, int] = {}
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(type(text).from_dict(fields))
    model: nn.Module = whole.base_model
    if lora is not None:
        add_adapters(whole, lora)
        if is_half:
            halve_frozen_layers(whole)
    with FakeTensorMode():
        give_memory(whole)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and tuple(tensor.shape) not in shapes:
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        alive: list[Tensor] = []  # or another could get the place of one that is gone
        shapes = {tuple(p.shape) for p in model.parameters()}  # their copies in half precision
        shapes |= {tuple(p.shape[::-1]) for p in model.parameters()}
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=is_half),
        ):
            model(input_ids=ids, use_cache=False)
    return sum(kept.values())


def give_memory(model: nn.Module) -> None:
    """Move weights and buffers from "meta" to a device that has memory to count, in fake mode."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # old, whose id stays taken, and new
    for module in model.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    real = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        real = nn.Parameter(real, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, real
                tensors[name] = made[id(tensor)][1]
