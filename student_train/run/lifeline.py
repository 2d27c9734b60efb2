"""Notice of a process that is gone: each process of a run keeps a connection to the first one.

The system closes it when a process ends, however it ends. gloo and NCCL notice only a process that
they wait for at that moment, and not while a group is formed; here each process learns of it at
once, and ends within `END_S` whatever it waits for.

The first process tells the others through torch's store where it listens. Each says who it is
and is made welcome; later it says that it leaves in order, or the first one who is lost.
"""

import itertools
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch.distributed as dist

from student_train.batch.gloo_exchange import TIMEOUT
from student_train.errors import DivergedLossError, InterruptedRunError, NonFiniteLossError
from student_train.run.written_first import is_writing
from teacher_cache.terminal.messages import say
from teacher_cache.terminal.progress import clear_displays

JOIN_S = 300.0  # for all processes to have started and imported torch
END_S = 20.0  # for a process to end with an error of its own, once another one is lost

_LINE_BYTES = 400
_HELLO_S = 10.0  # for a connection to say who it is
_WELCOME_S = 60.0  # for the first process to answer, whoever else is slow to say so
_SAYING_S = 5.0
_LOOK_S = 0.5
_KEPT_ALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 6))
_WELCOME, _LEAVING = b"welcome\n", b"leaving\n"
# Ends that all processes of a run come to together.
_COMMON_ENDS = (InterruptedRunError, DivergedLossError, NonFiniteLossError)

_runs = itertools.count()  # that this process has joined: a store may outlive a run


@dataclass(frozen=True)
class _End:
    """A connection, and who is at its other end."""

    connection: socket.socket
    lines: BinaryIO
    who: str


def joined_run(environment: Mapping[str, str]) -> "AbstractContextManager[Lifeline | None]":
    """Wait for the other processes of a run, and watch them inside the `with` block.

    Args:
        environment: Where the launcher says which process this is. A run of one, and one whose
            processes are given no place to meet, is not watched.

    Raises:
        ConnectionError: If a process has not joined within `JOIN_S`, or is lost.
    """
    num_processes = int(environment.get("WORLD_SIZE") or 1)
    if num_processes == 1 or not all(
        environment.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")
    ):
        return nullcontext()
    return Lifeline(
        int(environment["RANK"]),
        num_processes,
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


class Lifeline:
    """The connections of a process to the others of its run; a context manager that watches them.

    Leaving it with an error that not all processes have counts as being lost, for the others.
    """

    def __init__(
        self, rank: int, num_processes: int, address: str, port: int, *, has_store: bool
    ) -> None:
        """Set up; nothing is connected yet.

        Args:
            rank: This process.
            num_processes: Number of processes of the run.
            address: Host of the first process.
            port: Port of torch's store there.
            has_store: Whether the launcher keeps that store, and not the first process.
        """
        self._rank, self._num_processes = rank, num_processes
        self._address, self._port, self._has_store = address, port, has_store
        self._readable = selectors.DefaultSelector()
        self._ends: list[_End] = []  # the others; in all but the first process, that one
        self._listener: socket.socket | None = None  # in the first process
        self._absent = set(range(1, num_processes))
        self._is_complete = threading.Event()  # or one was lost before it was
        self._is_noticed = threading.Event()
        self._has_left = threading.Event()
        self._loss = ""  # who is lost
        self._secret = ""

    def __enter__(self) -> Self:
        """Join the others; it returns at once in all but the first process, which waits for them.

        Raises:
            ConnectionError: As `joined_run`.
        """
        try:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]  # not in torch's `__all__`
                self._address,
                self._port,
                self._num_processes,
                is_master=self._rank == 0 and not self._has_store,
                timeout=timedelta(seconds=JOIN_S),
                wait_for_workers=False,  # or one that is lost meanwhile goes unnoticed
                multi_tenant=True,  # torch's own group is formed over it
            )
            key = f"leadspan/lifeline/{next(_runs)}"
            if self._rank == 0:
                self._listen(key)
            else:
                self._connect(key)
        except BaseException as error:
            self._leave(in_order=False)
            if isinstance(error, RuntimeError):  # torch has a class for some of the store's only
                raise ConnectionError(self._unmet_text(error)) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave; an error of communication becomes one that says who is lost."""
        if isinstance(error, ConnectionError):
            self._is_noticed.wait(1.0)  # gloo may be the first to know
        self._leave(in_order=error is None or isinstance(error, _COMMON_ENDS))
        if isinstance(error, ConnectionError) and self._is_noticed.is_set():
            # It may be of this process itself: a store that cannot be reached is another one.
            raise ConnectionError(f"{self._lost_text()} (here: {error})") from error

    def group_arguments(self) -> dict[str, Any]:
        """Arguments of `init_process_group`: groups meet in a part of the store of their own.

        torchrun's store outlives the processes: after a restart torch would take the addresses of
        those that are gone.
        """
        self._store.set_timeout(TIMEOUT)
        store = dist.PrefixStore(f"leadspan/groups/{self._secret}", self._store)  # type: ignore[attr-defined]  # as above
        return {"store": store, "rank": self._rank, "world_size": self._num_processes}

    def _leave(self, *, in_order: bool) -> None:
        self._has_left.set()
        for end in list(self._ends):
            with suppress(OSError):  # it has left
                if in_order:
                    end.connection.sendall(_LEAVING)
                end.connection.shutdown(socket.SHUT_RDWR)

    def _lost_text(self) -> str:
        return (
            f"{self._loss} is gone; its own message, if it left one, says why. Run the same "
            "command again to resume"
        )

    def _unmet_text(self, error: RuntimeError) -> str:
        reason = str(error).partition("\n")[0].strip()
        place = f"{self._address}:{self._port}"
        if self._rank == 0:
            return (
                f"process 0 of {self._num_processes} cannot meet the others at {place} ({reason}): "
                "expected a port of this machine that no other run uses (--master-port of the "
                "launcher, MASTER_PORT)"
            )
        return (
            f"process {self._rank} of {self._num_processes} did not meet process 0 at {place} "
            f"within {JOIN_S:.0f} s ({reason}): see what ended it"
        )

    # In the first process: it listens, and tells the others.

    def _listen(self, key: str) -> None:
        has_both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=has_both)
        self._secret = secrets.token_hex(16)
        self._listener = listener
        self._readable.register(listener, selectors.EVENT_READ)
        self._start()
        port, host = listener.getsockname()[1], socket.gethostname()
        told = {"port": port, "hosts": [self._address, host], "host": host, "secret": self._secret}
        self._store.set(key, json.dumps(told))
        if not self._is_complete.wait(JOIN_S):
            raise ConnectionError(
                f"expected {self._num_processes} processes, found after {JOIN_S:.0f} s that "
                f"process {', '.join(map(str, sorted(self._absent)))} has not joined: see what "
                "ended it, and run the same command again"
            )
        if self._is_noticed.is_set():
            raise ConnectionError(self._lost_text())

    def _welcome(self, listener: socket.socket) -> None:
        """Take in a process that has connected; whoever does not know the secret is sent away."""
        try:
            connection, _ = listener.accept()
        except OSError:  # it is gone, or this process has too many files open: it tries again
            time.sleep(0.1)
            return
        connection.settimeout(_HELLO_S)
        lines = connection.makefile("rb")
        hello = b""
        with suppress(OSError):
            hello = lines.readline(_LINE_BYTES)
        secret, rank, host = [*hello.decode(errors="replace").split(), "", "", ""][:3]
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            connection.close()
            return
        with suppress(OSError):
            connection.sendall(_WELCOME)
        self._keep(_End(connection, lines, f"process {rank} of {self._num_processes} on {host}"))
        self._absent.discard(int(rank))
        if not self._absent:
            self._readable.unregister(listener)
            listener.close()
            self._is_complete.set()

    # In the others.

    def _connect(self, key: str) -> None:
        until_s = time.monotonic() + JOIN_S
        while True:
            told = json.loads(self._store.get(key))
            end, failures = self._met(told)
            if end is not None:
                self._keep(end)
                self._start()
                return
            # torchrun keeps what the first process told before it was restarted.
            if time.monotonic() > until_s:
                raise ConnectionError(
                    f"process {self._rank} did not meet process 0 at its port {told['port']} "
                    f"within {JOIN_S:.0f} s ({'; '.join(failures)}): expected machines that reach "
                    "each other by TCP, at any port"
                )
            time.sleep(1.0)

    def _met(self, told: dict[str, str]) -> tuple[_End | None, list[str]]:
        """The connection to the first process, or why there is none at each of its addresses."""
        failures = []
        for host in told["hosts"]:
            try:
                connection = socket.create_connection((host, told["port"]), timeout=_HELLO_S)
            except OSError as error:
                failures.append(f"{host}: {error}")
                continue
            connection.settimeout(_WELCOME_S)
            lines, answer = connection.makefile("rb"), b""
            hello = f"{told['secret']} {self._rank} {socket.gethostname()}\n"
            with suppress(OSError):
                connection.sendall(hello.encode())
                answer = lines.readline(_LINE_BYTES)
            if answer == _WELCOME:
                self._secret = told["secret"]
                who = f"process 0 of {self._num_processes} on {told['host']}"
                return _End(connection, lines, who), []
            failures.append(f"{host}: another program answers")
            lines.close()
            connection.close()
        return None, failures

    # In the thread.

    def _keep(self, end: _End) -> None:
        end.connection.settimeout(None)
        end.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEPT_ALIVE:  # a machine without power closes nothing
            if hasattr(socket, name):
                end.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._readable.register(end.connection, selectors.EVENT_READ, end)
        self._ends.append(end)

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        try:
            while not self._has_left.is_set() and not self._is_noticed.is_set():
                for key, _ in self._readable.select(timeout=1.0):
                    if key.fileobj is self._listener:
                        self._welcome(self._listener)
                    elif not self._is_there(key.data):
                        self._end_process()
                        break
        finally:
            if self._listener is not None:
                self._listener.close()
            for end in self._ends:
                end.lines.close()
                end.connection.close()
            self._readable.close()

    def _is_there(self, end: _End) -> bool:
        """Read what the other end says; False if it is lost, or says who is."""
        said = b""
        with suppress(OSError):
            said = end.lines.readline(_LINE_BYTES)
        if self._has_left.is_set():
            return True
        self._readable.unregister(end.connection)
        if said == _LEAVING:
            return True
        self._loss = said.decode(errors="replace").strip() or end.who
        return False

    def _end_process(self) -> None:
        """Tell the others who is lost, and end this process if it does not do so itself."""
        if self._rank == 0:  # before this process knows, and leaves
            for end in self._ends:
                with suppress(OSError):
                    end.connection.sendall(f"{self._loss}\n".encode())
        self._is_noticed.set()
        self._is_complete.set()
        until_s = time.monotonic() + END_S
        while time.monotonic() < until_s:
            if self._has_left.wait(_LOOK_S):
                return
            if is_writing():
                until_s = time.monotonic() + END_S
        # Nobody may be able to read it, or a lock of the terminal be held for ever.
        last_words = threading.Thread(target=self._say_lost, daemon=True)
        last_words.start()
        last_words.join(_SAYING_S)
        os._exit(1)

    def _say_lost(self) -> None:
        clear_displays()
        say(f"train-student: {self._lost_text()}")
