"""The most memory that a run has held at one time."""

from pathlib import Path

import torch


class PeakMemory:
    """Counts from its making on.

    On CUDA: bytes of tensors, by the allocator. On the CPU: growth of the process' resident
    memory, which libraries that load late and the allocator's slack are a part of; 0 on systems
    without /proc.
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
        """The most so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, resident_bytes("VmHWM") - self._before_bytes)


def resident_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the most) of this process; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
