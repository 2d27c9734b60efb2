"""Peak memory of a run, and the advice to give when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from student_train.errors import OutOfMemoryError
from student_train.run.config import TrainConfig


class PeakMemory:
    """Peak memory since the object was created.

    On CUDA: bytes of tensors, by the allocator. On the CPU: growth of the process' resident
    memory, including libraries that load late and the allocator's slack; 0 on systems without
    /proc.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            if Path("/proc/self/clear_refs").exists():
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self._before_bytes = resident_bytes("VmRSS")

    @property
    def peak_bytes(self) -> int:
        """Peak so far in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, resident_bytes("VmHWM") - self._before_bytes)


@contextmanager
def advice_when_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory into an error that says what to lower.

    Raises:
        OutOfMemoryError: Instead of PyTorch's and Python's own errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # PyTorch's CPU allocator has no class of its own.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "can't allocate memory" not in str(error)
        ):
            raise
        remedies = [f"lower --batch-tokens (now {config.batch_tokens:,}) or --lead-span"]
        if not config.gradient_checkpointing:
            remedies.append("add --gradient-checkpointing")
        if config.dtype != "bfloat16":
            remedies.append("use --dtype bfloat16")
        if config.sharding == "none":
            remedies.append("split the student over several processes with --sharding full")
        elif not config.offload:
            remedies.append("add --offload")
        if config.context_parallel == 1:
            remedies.append("share long traces among several with --context-parallel")
        reason = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(f"out of memory: {'; '.join(remedies)} ({reason})") from error


def resident_bytes(name: str) -> int:
    """VmRSS (current) or VmHWM (peak) of this process; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
