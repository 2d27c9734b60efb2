"""Processes of one run that a launcher started."""

import os

# Where launchers tell a process its number: torchrun, and MPI's.
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def is_first_process() -> bool:
    """Whether this process speaks for its run: it is the first, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)
