"""Placement of the student's weights: on one device, copied to every process, or split over them.

Split means torch's `fully_shard` (FSDP2), called here and not through accelerate, whose plugin is
silently ignored on the CPU. On several nodes the parts may be those of one node, copied to every
other (HSDP): then weights travel within nodes, and gradients alone between them. The main process
alone has the weights at first; the others get them here, one part after the other. Every decoder
layer is gathered when it is used; the root, with embedding, head and their shared weights, stays
whole from the forward to the backward, so that the loss finds the head's weight as one tensor.
Layers are compiled, where they are, before they are split.
"""

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from student_train.batch.micro_batch import empty_micro_batch
from student_train.model.forward import StudentWithLoss
from student_train.model.load import decoder_layers


def place(
    student: StudentWithLoss, accelerator: Accelerator, sharding: str, *, offload: bool = False
) -> nn.Module:
    """Move a student to the devices of a run; its optimizer is created afterwards.

    Args:
        student: Student on the CPU; its weights are those of the main process.
        accelerator: Accelerator of the run.
        sharding: "none" (a copy in every process), "full" (parameters, gradients and optimizer
            state are split over the processes) or "hybrid" (over those of a node).
        offload: Whether the parts stay in the memory of the hosts, and visit the device for use.

    Returns:
        The module to call; `student` holds the same parameters.

    Raises:
        ValueError: If there is nothing to split over, or no second node.
    """
    if sharding == "none":
        _share(student, accelerator)
        placed: nn.Module = accelerator.prepare(student)
        if accelerator.num_processes > 1:
            _settle_buckets(placed, accelerator)
        return placed
    mesh = _mesh(sharding, accelerator)
    is_half = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_half else None,
        reduce_dtype=torch.float32 if is_half else None,  # sums over ranks keep their digits
        cast_forward_inputs=False,  # the teacher's logits and the tokens' weights stay float32
    )
    is_cuda = accelerator.device.type == "cuda"
    stays = CPUOffloadPolicy(pin_memory=is_cuda) if offload else OffloadPolicy()
    for layer in decoder_layers(student.model):
        _share(layer, accelerator)  # one by one: a device need not hold them all
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=stays)
    _share(student, accelerator)
    fully_shard(student, mesh=mesh, mp_policy=policy, offload_policy=stays)
    register_fsdp_forward_method(student, "per_token")
    return student


def _share(module: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main one's weights and buffers, on the device of the run.

    What is split already stays as it is, and what is tied stays one tensor.
    """
    if accelerator.num_processes == 1:
        return
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, whose ids stay taken
    for part in module.modules():
        both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in shared:
                    shared[id(tensor)] = tensor, _shared(tensor, accelerator.device)
                tensors[name] = shared[id(tensor)][1]


def _shared(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta:
        value = torch.empty_like(tensor, device=device, requires_grad=False)
    else:
        value = tensor.detach().to(device)
    dist.broadcast(value, src=0)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _settle_buckets(copied: nn.Module, accelerator: Accelerator) -> None:
    """Let DDP sort its buckets of gradients before the first step, not in the second.

    A gradient's place in its bucket decides in which order the processes' shares are added. Sorted
    after a resume, buckets would give other last bits than in the run that was not interrupted.
    """
    device, num_positions = accelerator.device, 8  # or torch.compile would make code for one
    empty = empty_micro_batch()
    nothing = replace(
        empty, input_ids=empty.input_ids.repeat(1, num_positions), longest=num_positions
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loss, _ = copied(nothing.to(device))
        accelerator.backward(loss)  # the next forward sorts them
    copied.zero_grad()


def _mesh(sharding: str, accelerator: Accelerator) -> DeviceMesh:
    """The processes among which weights are split; in rows that are copies of each other."""
    device_type, num_processes = accelerator.device.type, accelerator.num_processes
    if num_processes == 1:
        raise ValueError(
            f"--sharding {sharding}: there is one process; start several with torchrun, or use "
            "--sharding none"
        )
    if sharding == "full":
        return init_device_mesh(device_type, (num_processes,), mesh_dim_names=("shard",))
    on_each = processes_of_a_node()
    if on_each == 1 or num_processes == on_each or num_processes % on_each:
        raise ValueError(
            "--sharding hybrid: it splits over the processes of a node and copies to other nodes; "
            "expected several nodes of as many processes, at least two each, got "
            f"{num_processes} processes with {on_each} on this node. Use --sharding full"
        )
    sizes = (num_processes // on_each, on_each)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))


def processes_of_a_node() -> int:
    """Number of processes on this node, as the launcher says; 1 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def without_exchange(
    student: nn.Module, accelerator: Accelerator, *, is_last: bool
) -> AbstractContextManager[None]:
    """Let copies exchange accumulated gradients once, with the last micro-batch.

    Split gradients are exchanged every time: keeping whole ones would undo the savings.
    """
    if is_last or isinstance(student, StudentWithLoss):
        return nullcontext()
    context: AbstractContextManager[None] = accelerator.no_sync(student)
    return context


def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> float:
    """Scale the gradients down to a norm over all parameters and processes; 0 does not scale.

    Returns:
        The norm before scaling.
    """
    norm: Any = nn.utils.clip_grad_norm_(list(parameters), largest_norm or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
