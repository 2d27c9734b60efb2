"""The processes of a run, joined into one group; the main one owns the run's folder."""

import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from student_train.batch.gloo_exchange import TIMEOUT
from student_train.run.config import TrainConfig
from student_train.run.folder import SEEN_PREFIX
from student_train.run.lifeline import Lifeline
from teacher_cache.format import CacheError
from teacher_cache.format.folder_lock import LOCK_NAME, FolderLock

# Variables in which launchers give the number of processes: torchrun and accelerate, MPIs.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Network file systems show a new file to other machines after some seconds.
_SEEN_WITHIN_S = 15.0

_T = TypeVar("_T")


def require_open_group() -> None:
    """Refuse a second run of processes that have trained together: accelerate ends their group.

    Raises:
        ValueError: Says so, and what to do.
    """
    were_several = bool(PartialState._shared_state) and PartialState().num_processes > 1
    if were_several and not dist.is_initialized():
        raise ValueError(
            "these processes have trained together before, and their group has ended: start them "
            "anew for each run, for example with a command of `torchrun` each"
        )


def join_processes(config: TrainConfig, lifeline: Lifeline | None) -> Accelerator:
    """Form the group of this run's processes; every process calls it before anything else.

    Args:
        config: Configuration, with its precision decided.
        lifeline: Where they have met; None where accelerate finds them.

    Raises:
        ValueError: If a launcher started several that do not find each other (each would train
            alone, and all of them into one folder), or if the tracker is not installed.
    """
    if importlib.util.find_spec(config.tracker) is None and config.tracker != "none":
        raise ValueError(f"tracker: {config.tracker} is not installed; pip install it")
    num_started = max(int(os.environ.get(name) or 1) for name in _SIZES)
    num_started = max(num_started, int(os.environ.get("LOCAL_RANK") or 0) + 1)
    # A rank waits for the main one while it writes: a large checkpoint takes long.
    group: dict[str, Any] = {"timeout": TIMEOUT, **_backend(config)}
    is_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if lifeline is not None:
        PartialState(cpu=is_cpu, **group, **lifeline.group_arguments())
    elif num_started > 1 and is_cpu:
        PartialState(cpu=True, **group)  # of itself accelerate does so with ACCELERATE_USE_CPU only
    accelerator = Accelerator(
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.out, logging_dir=config.out),
        kwargs_handlers=[
            InitProcessGroupKwargs(**group),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # or both are in memory
        ],
    )
    if accelerator.num_processes < num_started:
        raise ValueError(
            f"the environment says that {num_started} processes were started (WORLD_SIZE "
            f"{os.environ.get('WORLD_SIZE')}, LOCAL_RANK {os.environ.get('LOCAL_RANK')}), this one "
            f"finds {accelerator.num_processes}: each would train alone into {config.out}. Start "
            f"them with `torchrun --nproc_per_node {num_started} -m student_train.cli run ...`, "
            "or unset these variables to train with one process"
        )
    return accelerator


def _backend(config: TrainConfig) -> dict[str, str]:
    """Argument for collectives on the CPU as well, where parts of the student stay."""
    is_needed = config.offload and torch.cuda.is_available()
    return {"backend": "cuda:nccl,cpu:gloo"} if is_needed else {}


def decided_by_main(accelerator: Accelerator, decide: Callable[[], _T]) -> _T:
    """Return the main process' decision in every process; the others wait for it.

    Raises:
        CacheError, OSError, ValueError: As `decide` does, in every process.
    """
    found: tuple[_T | None, CacheError | OSError | ValueError | None] = (None, None)
    if accelerator.is_main_process:
        try:
            found = (decide(), None)
        except (CacheError, OSError, ValueError) as error:
            found = (None, error)
    (decision, refusal), *_ = broadcast_object_list([found])
    if refusal is not None:
        raise refusal
    return cast("_T", decision)


@contextmanager
def owned(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Own a run's folder: the main process holds its lock for all processes.

    Raises:
        InUseError: In every process, if another run is at work there.
        OSError: In every process, if the folder cannot be created or locked.
    """
    with ExitStack() as held:

        def lock() -> None:
            held.enter_context(FolderLock(folder / LOCK_NAME))

        decided_by_main(accelerator, lock)
        _require_shared(folder, accelerator)
        yield


def _require_shared(folder: Path, accelerator: Accelerator) -> None:
    """Refuse a folder that is another one on some machine: all write their parts of a checkpoint.

    Raises:
        ValueError: In every process, if one does not see what the main one writes there.
    """
    if accelerator.num_processes == 1:
        return

    def show() -> tuple[Path, str]:
        file = folder / f"{SEEN_PREFIX}{secrets.token_hex(8)}"
        file.touch()
        return file, gethostname()

    file, main_host = decided_by_main(accelerator, show)
    until_s = time.monotonic() + _SEEN_WITHIN_S
    while not (is_seen := file.exists()) and time.monotonic() < until_s:
        time.sleep(0.5)
    found = gather_object([(gethostname(), is_seen)])
    if accelerator.is_main_process:
        file.unlink()
    blind = [host for host, sees in found if not sees]
    if blind:
        raise ValueError(
            f"{folder}: expected a folder that all machines share, found that {blind[0]} does not "
            f"see what {main_host} writes there. Each process writes its part of a checkpoint: "
            "give --out on a file system that all machines reach by the same path"
        )
