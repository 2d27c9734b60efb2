"""Work on files that the processes of a run do together, or wait for while one of them does it.

They wait over gloo: NCCL would keep the GPUs busy meanwhile, and end the run for what it takes for
a failure of the network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from student_train.batch.gloo_exchange import TIMEOUT
from student_train.errors import NonFiniteLossError


class FileWork:
    """The processes' meeting point; one thread at a time may use it."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Create the gloo group; every process does so at the same point."""
        self.is_main = accelerator.is_main_process
        self.rank = accelerator.process_index
        self.num_processes = accelerator.num_processes
        self.group: Any = None  # a ProcessGroup where there are several processes
        if accelerator.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Leave the body when every process has; if it fails in one, it fails in all.

        Raises:
            ConnectionError: If another process is gone.
            NonFiniteLossError, OSError, ValueError: As the body does, in every process.
        """
        failure: NonFiniteLossError | OSError | ValueError | None = None
        try:
            yield
        except (NonFiniteLossError, OSError, ValueError) as error:
            failure = error
        if self.group is None:
            failures = [failure]
        else:
            failures = [None] * dist.get_world_size(self.group)
            try:
                dist.all_gather_object(failures, failure, group=self.group)
            except RuntimeError as error:  # gloo's only error
                raise lost_process(error, "files were written") from failure or error
        for found in failures:
            if found is not None:
                raise failure or found


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the errors of a group whose other process is gone into one that says so.

    Raises:
        ConnectionError: Instead of the errors of gloo and NCCL.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        raise lost_process(error, "this one trained") from error


def is_of_lost_process(error: RuntimeError) -> bool:
    """Whether a group raised it because another process is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)  # which has no class


def lost_process(error: BaseException, meanwhile: str) -> ConnectionError:
    """The error to raise for one of gloo's, which are all alike: another process is gone."""
    reason = str(error).partition("\n")[0]
    return ConnectionError(
        f"another process of this run is gone while {meanwhile} ({reason}); run the same command "
        "again to resume"
    )
