"""One process at a time in a folder, with real processes that hold, die and wait."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from teacher_cache.format.folder_lock import FolderLock, InUseError

HOLD = """
import sys, time
from pathlib import Path
from teacher_cache.format.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
lock.close()
"""


def holder(file, *words, seconds=60):
    """A process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), str(seconds), *words], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "lock"


def test_a_second_process_is_told_who_is_at_work(file):
    with holder(file, "s3://key:secret@bucket/cache?access_key=secret") as first:
        with pytest.raises(InUseError) as refused:
            FolderLock(file)
        first.kill()
    said = str(refused.value)
    assert said.startswith(
        f"{file.parent}: in use by process {first.pid} on {socket.gethostname()}"
    )
    assert "s3://bucket/cache" in said
    assert "secret" not in said
    assert "wait for it to end" in said
    assert "\n" not in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(file, number):
    with holder(file) as first:
        first.send_signal(number)
    FolderLock(file).close()


def test_a_lock_lasts_as_long_as_a_child_that_inherits_it(file):
    lock = FolderLock(file)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]
    ) as child:
        os.close(os.dup(lock.fileno()))
        lock._file.close()  # as if this process had died
        with pytest.raises(InUseError):
            FolderLock(file)
        child.communicate(b"\n")
    FolderLock(file).close()


def test_a_folder_made_for_a_lock_goes_with_it_and_others_stay(file):
    FolderLock(file).close()
    assert not file.parent.exists()
    file.parent.mkdir()
    FolderLock(file).close()
    assert list(file.parent.iterdir()) == []
    with FolderLock(file):
        (file.parent / "result").touch()
    assert [path.name for path in file.parent.iterdir()] == ["result"]


def test_a_kept_file_says_nothing_of_who_had_it(file):
    with FolderLock(file, keep=True):
        assert file.stat().st_size
    assert file.stat().st_size == 0


def test_a_file_in_the_place_of_the_folder_is_named(file):
    file.parent.write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"run: expected a folder, found a file"):
        FolderLock(file)


def test_waiting_takes_the_lock_when_it_is_free(file):
    with holder(file, seconds=0.5):
        started_s = time.monotonic()
        with FolderLock(file, wait=True):
            assert time.monotonic() - started_s > 0.2


@pytest.mark.slow
def test_many_processes_never_hold_it_together(file):
    """Each takes the file away when it is done, under the noses of those that wait."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from teacher_cache.format.folder_lock import FolderLock\n"
        "lock, count = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for _ in range(40):\n"
        "    with FolderLock(lock, wait=True):\n"
        "        number = int(count.read_text())\n"
        "        time.sleep(0.0005)\n"
        "        count.write_text(str(number + 1))\n"
    )
    count = file.parent.with_name("count")
    count.write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(file), str(count)]) for _ in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    assert count.read_text() == "160"
    assert not file.exists()
