"""Processes of a run that are killed, at any moment: the others end soon, and say who is gone.

They are threads here: a killed process is one whose connection the system has closed, and one that
waits in gloo or NCCL is one that does not leave.
"""

import json
import re
import socket
import threading
import time
from contextlib import suppress

import pytest
from processes import free_port
from torch.distributed import TCPStore

from student_train.errors import InterruptedRunError
from student_train.run import lifeline
from student_train.run.written_first import written_first

STUCK = threading.Event()  # what a process waits for that does not notice


class Process(threading.Thread):
    """One process of a run: joins, does its work inside, and leaves."""

    def __init__(self, rank, port, work, num_processes=3, *, has_store=False):
        super().__init__(daemon=True)
        self.lifeline = lifeline.Lifeline(
            rank, num_processes, "127.0.0.1", port, has_store=has_store
        )
        self.work, self.error, self.has_joined = work, None, threading.Event()
        self.start()

    def run(self):
        try:
            with self.lifeline:
                self.has_joined.set()
                self.work(self)
        except Exception as error:
            self.error = error

    def be_killed(self):
        assert self.has_joined.wait(10)
        for end in self.lifeline._ends:
            with suppress(OSError):  # its thread was faster
                end.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ended(monkeypatch):
    """Numbers with which a process was ended, although it did not leave."""
    found = []
    STUCK.clear()
    monkeypatch.setattr(lifeline.os, "_exit", found.append)
    monkeypatch.setattr(lifeline, "END_S", 0.2)
    monkeypatch.setattr(lifeline, "JOIN_S", 5.0)
    # All of them are runs of this one process.
    monkeypatch.setattr(lifeline, "_runs", iter([0] * 8))
    yield found
    STUCK.set()


def wait_for(condition):
    until_s = time.monotonic() + 10
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert condition()


def test_the_others_learn_who_is_lost_though_the_first_process_leaves_at_once(ended, capsys):
    port, is_noticed = free_port(), threading.Event()

    def work(one):
        if one.lifeline._rank == 0:
            is_noticed.wait()
            raise ConnectionError("gloo was the first to know")
        STUCK.wait()

    all_eight = [Process(rank, port, work, 8) for rank in range(8)]
    assert all(one.has_joined.wait(10) for one in all_eight)
    all_eight[5].lifeline._has_left.set()  # its thread is killed too
    is_noticed.set()
    time.sleep(0.05)  # the first process waits to be told by now
    all_eight[5].be_killed()
    wait_for(lambda: len(ended) == 6)
    all_eight[0].join(10)
    assert str(all_eight[0].error).startswith("process 5 of 8 on ")
    assert str(all_eight[0].error).endswith("(here: gloo was the first to know)")
    said = capsys.readouterr().err
    assert said.count("process 5 of 8 on ") == 6 and "process 0" not in said


def test_a_process_ends_although_nobody_can_read_why_but_not_while_it_writes(ended, monkeypatch):
    def broken(_):
        raise BrokenPipeError

    monkeypatch.setattr(lifeline, "say", broken)
    monkeypatch.setattr(lifeline.threading, "excepthook", lambda _: None)
    port = free_port()
    two = [Process(rank, port, lambda _: STUCK.wait(), 2) for rank in range(2)]
    assert all(one.has_joined.wait(10) for one in two)
    with written_first():
        two[1].lifeline._has_left.set()
        two[1].be_killed()
        time.sleep(0.7)  # more than three times `END_S`
        assert ended == []
    wait_for(lambda: ended == [1])


@pytest.mark.parametrize("victim", [0, 1])
def test_processes_that_wait_for_a_killed_one_are_ended(ended, capsys, victim):
    """In forming a group, in NCCL, at the end of a checkpoint: wherever that is."""
    port = free_port()
    all_three = [Process(rank, port, lambda _: STUCK.wait()) for rank in range(3)]
    assert all(one.has_joined.wait(10) for one in all_three)
    one = all_three[victim].lifeline
    one._has_left.set()  # its thread is killed too
    all_three[victim].be_killed()
    wait_for(lambda: len(ended) == 2)

    assert ended == [1, 1]
    said = capsys.readouterr().err.splitlines()
    host = socket.gethostname()
    assert len(said) == 2
    for line in said:
        assert line.startswith(f"train-student: process {victim} of 3 on {host} is gone; ")
        assert line.endswith("Run the same command again to resume")


def test_an_error_of_communication_says_who_is_gone(ended):
    port = free_port()
    died = threading.Event()

    def talk(process):
        died.wait(10)
        raise ConnectionError("Connection closed by peer [127.0.0.1]:1234")

    def die(process):
        raise MemoryError

    talking = [Process(0, port, talk), Process(1, port, talk)]
    assert talking[1].has_joined.wait(10)
    killed = Process(2, port, die)
    killed.join(10)
    died.set()
    for one in talking:
        one.join(10)
        assert isinstance(one.error, ConnectionError)
        assert "process 2 of 3" in str(one.error)
    assert isinstance(killed.error, MemoryError)
    assert not ended


@pytest.mark.parametrize("error", [None, InterruptedRunError("stopped", 15)])
def test_processes_may_leave_one_after_the_other(ended, error):
    """The last of them may take longer than `END_S` to close its tracker."""
    port = free_port()
    last = threading.Event()

    def leave(process):
        if process.lifeline._rank == 0:
            last.wait(10)
        if error is not None:
            raise error

    all_three = [Process(rank, port, leave) for rank in range(3)]
    for one in all_three[1:]:
        one.join(10)
    time.sleep(0.4)
    last.set()
    all_three[0].join(10)
    assert [one.error for one in all_three] == [error] * 3
    assert not ended


def test_a_process_that_never_joins_is_named(ended, monkeypatch):
    """It was killed before it reached the others; those that did join end with the first one."""
    monkeypatch.setattr(lifeline, "JOIN_S", 0.5)
    port = free_port()
    first, other = (
        Process(0, port, lambda _: STUCK.wait()),
        Process(2, port, lambda _: STUCK.wait()),
    )
    first.join(10)
    assert re.match(
        "expected 3 processes, found after 0 s that process 1 has not joined", str(first.error)
    )
    assert other.has_joined.wait(10)
    wait_for(lambda: ended == [1])


def test_a_first_process_that_never_starts_is_said(ended, monkeypatch, capfd):
    monkeypatch.setattr(lifeline, "JOIN_S", 0.5)
    one = Process(1, free_port(), lambda _: None)
    one.join(30)
    assert isinstance(one.error, ConnectionError)
    assert "process 1 of 3 did not meet process 0 at 127.0.0.1" in str(one.error)


def test_what_the_first_process_told_before_it_was_restarted_is_not_believed(ended):
    """The store is the launcher's, as under torchrun, and outlives the processes."""
    port = free_port()
    stored = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    told = {"port": free_port(), "hosts": ["127.0.0.1"], "host": "h", "secret": "old"}
    stored.set("leadspan/lifeline/0", json.dumps(told))
    other = Process(1, port, lambda _: None, num_processes=2, has_store=True)
    time.sleep(0.3)  # it has read that
    first = Process(0, port, lambda _: None, num_processes=2, has_store=True)
    for one in (first, other):
        one.join(10)
        assert one.error is None
    assert not ended


def test_a_port_that_something_else_uses_is_said(ended, capfd):
    with socket.create_server(("127.0.0.1", 0)) as other:
        one = Process(0, other.getsockname()[1], lambda _: None)
        one.join(30)
    assert "process 0 of 3 cannot meet the others at 127.0.0.1" in str(one.error)
    assert "--master-port" in str(one.error)


def test_a_process_killed_while_others_have_yet_to_join_is_noticed(ended):
    port = free_port()
    first = Process(0, port, lambda _: None)
    killed = Process(1, port, lambda _: STUCK.wait())
    killed.be_killed()
    started_s = time.monotonic()
    first.join(10)
    assert time.monotonic() - started_s < 4  # not only at `JOIN_S`
    assert str(first.error).startswith("process 1 of 3")


def test_strangers_are_sent_away(ended):
    port = free_port()
    done = threading.Event()
    first = Process(0, port, lambda _: done.wait(10))
    other = Process(1, port, lambda _: done.wait(10))
    assert other.has_joined.wait(10)
    stranger = socket.create_connection(
        ("127.0.0.1", first.lifeline._listener.getsockname()[1]), timeout=5
    )
    stranger.sendall(b"GET / HTTP/1.1\r\n")
    with stranger, suppress(ConnectionResetError):
        assert stranger.recv(10) == b""
    last = Process(2, port, lambda _: done.wait(10))
    assert first.has_joined.wait(10)
    done.set()
    for one in (first, other, last):
        one.join(10)
        assert one.error is None


def test_a_run_of_one_process_waits_for_nobody():
    with lifeline.joined_run({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}) as alone:
        assert alone is None
