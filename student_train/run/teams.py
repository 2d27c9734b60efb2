"""Teams of processes that share every trace, each with a part of its tokens (context parallel)."""

from dataclasses import dataclass

import torch.distributed as dist
from accelerate import Accelerator

from student_train.batch.gloo_exchange import TIMEOUT, GlooExchange
from student_train.batch.sequence_parts import SequencePart


@dataclass(frozen=True)
class Teams:
    """Place of a process in the teams of a run; by default each process is one."""

    team: int  # number of its team
    num_teams: int
    part: SequencePart  # its own of every trace of its team
    group: dist.ProcessGroup | None  # its team; None where that is the process alone
    exchange: GlooExchange | None  # of traces among teams; None where there is one


def make_teams(accelerator: Accelerator, size: int) -> Teams:
    """Divide the processes of a run into teams of neighbours; every process calls it.

    Raises:
        ValueError: If they cannot be divided so.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if num_processes % size:
        raise ValueError(
            f"--context-parallel {size}: expected a multiple of {size} processes, got "
            f"{num_processes}; start as many with torchrun --nproc-per-node"
        )
    num_teams = num_processes // size
    team, member = divmod(rank, size)
    group = None
    if size > 1:
        ranks = list(range(team * size, (team + 1) * size))
        group = dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)
    exchange = None
    if num_teams > 1:
        # Every member reads what its team trains on: no trace travels within a team.
        exchange = GlooExchange(range(member, num_processes, size))
    return Teams(team, num_teams, SequencePart(member, size), group, exchange)
