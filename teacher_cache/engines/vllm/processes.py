"""The engine's processes: shielded from the terminal, watched, and ended with ours."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

from teacher_cache.engines import EngineError

_LOOK_S = 0.1


class EngineProcesses:
    """All processes that an engine starts.

    vLLM 0.32's engine does not notice when its parent is killed: it would keep the GPU's
    memory forever and leave the next engine none. So a shell waits for our end, however it
    comes, and kills them. A line `off` on its stdin dismisses it.
    """

    def __init__(self) -> None:
        # Process groups, to reach grandchildren too.
        watch = (
            "ids=; while read -r id; do case $id in "
            'off) exit;; gone) ids=;; *) ids="$ids $id";; esac; done; '
            "for id in $ids; do kill -9 -$id || kill -9 $id; done 2>/dev/null"  # dash knows no --
        )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", watch],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        self.all: list[BaseProcess] = []
        self._others = multiprocessing.active_children()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Count every process that multiprocessing starts inside the block as the engine's."""
        has_started = threading.Event()
        watching = threading.Thread(target=self._watch, args=(has_started,), daemon=True)
        watching.start()
        try:
            with _own_sessions():
                yield
        finally:
            has_started.set()
            watching.join()
        self._require_spawned()

    def _require_spawned(self) -> None:
        """Refuse an engine with forked processes: they would hold our open files and locks.

        Raises:
            EngineError: If one is forked, whatever vLLM was told.
        """
        forked = [each for each in self.all if not isinstance(each, SpawnProcess)]
        if forked:
            raise EngineError(
                f"expected vLLM to spawn its processes, but {forked[0].name} is a "
                f"{type(forked[0]).__name__}; this version of vLLM cannot be used"
            )

    def _watch(self, has_started: threading.Event) -> None:
        is_last = False
        while not is_last:
            is_last = has_started.wait(_LOOK_S)
            for each in multiprocessing.active_children():
                if each not in self._others and each not in self.all:
                    self.all.append(each)
                    self._tell_guard(str(each.pid))

    def report_death(self, engine: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
        """Make `engine.step` raise once one of the processes has ended.

        A process killed by the kernel (out of memory) sends nothing, and vLLM 0.32 then waits
        for its next message forever.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        def wait(processes: Sequence[BaseProcess]) -> None:
            left = {process.sentinel for process in processes}
            left -= set(multiprocessing.connection.wait(left))
            engine.engine_core.outputs_queue.put(EngineDeadError())
            while left:
                left -= set(multiprocessing.connection.wait(left))
            self._tell_guard("gone")  # the numbers of processes are used again

        if self.all:  # none if VLLM_ENABLE_V1_MULTIPROCESSING=0
            threading.Thread(target=wait, args=(self.all,), daemon=True, name="vllm-death").start()

    def close(self) -> None:
        """Kill processes that have not ended by themselves, and dismiss the guard."""
        for each in self.all:
            if each.is_alive() and each.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each.pid, signal.SIGKILL)
        self._tell_guard("off")
        with contextlib.suppress(BrokenPipeError):
            self._guard.communicate()

    def _tell_guard(self, line: str) -> None:
        if self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ValueError):  # killed, or dismissed
                self._guard.stdin.write(f"{line}\n".encode())
                self._guard.stdin.flush()


@contextmanager
def _own_sessions() -> Iterator[None]:
    """Shield children of multiprocessing from the terminal: Ctrl-C is ours to handle.

    We pass the signal on as an order to end. vLLM 0.32's engine also ends at a SIGINT, and its
    parent then waits for it: ten minutes, if it had not started yet.
    """
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_apart(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        for descriptor in passfds:
            os.set_inheritable(descriptor, True)
        try:
            return os.posix_spawn(path, list(args), os.environ, setsid=True)
        finally:
            for descriptor in passfds:
                os.set_inheritable(descriptor, False)

    multiprocessing.util.spawnv_passfds = spawn_apart
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = spawn
