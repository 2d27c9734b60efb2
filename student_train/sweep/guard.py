"""Ends a sweep's processes if the sweep is killed: nothing else would tell them."""

import contextlib
import subprocess
from collections.abc import Iterable

# Each line replaces the list of process groups; the end of the input is the end of the sweep.
_WATCH = (
    "now=; while read -r line; do now=$line; done; "
    "for id in $now; do kill -TERM -$id; done 2>/dev/null"
)


class Guard:
    """A shell that waits for the end of this process, however it comes.

    SIGTERM lets a run write a checkpoint.
    """

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle
        )

    def watch(self, groups: Iterable[int]) -> None:
        """Name the process groups to end, instead of those named before."""
        if self._shell.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody killed the shell
                self._shell.stdin.write(f"{' '.join(map(str, groups))}\n".encode())
                self._shell.stdin.flush()

    def close(self) -> None:
        """Dismiss the shell; it ends nobody."""
        self.watch(())
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate()
