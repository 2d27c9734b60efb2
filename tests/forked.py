"""Commands in processes that have imported everything: forked from one that did it once.

Ten seconds of a short command are its imports. Output, signals, exit codes, files and children are
those of any other process; tests of what a command imports, or of variables that are read while it
does, start a new interpreter instead.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CACHE_TEACHER = "from teacher_cache.cli import program; program()"
TRAIN_STUDENT = "from student_train.cli import main; main()"
TRAINING = (
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation.utils", "accelerate",
)  # fmt: skip
WITH_VLLM = (*TRAINING, "vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")
_AT_START = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
_MAX_MESSAGE_BYTES = 1 << 17


class Forked:
    """A process that runs `code` with arguments, as `subprocess.Popen` shows one.

    Its output is kept, or goes to the descriptors `streams` for its input, output and errors; it
    then leads a session, as one on a terminal of its own.
    """

    def __init__(self, code, *arguments, env=None, cwd=None, streams=None, imported=TRAINING):
        self.returncode = None
        self._written = [os.memfd_create(name) for name in ((), ("out", "err"))[not streams]]
        request = {
            "code": code, "arguments": [str(each) for each in arguments],
            "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ),
            "leads_session": bool(streams),
        }  # fmt: skip
        self._status, theirs = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        descriptors = [*(streams or (nothing, *self._written)), theirs]
        socket.send_fds(_server(imported), [json.dumps(request).encode()], descriptors)
        os.close(nothing)
        os.close(theirs)
        self._heard = b""
        self.pid = int(self._line(None))

    def _line(self, timeout_s):
        """The next line about the process; None if it does not come in time."""
        deadline_s = time.monotonic() + (1e9 if timeout_s is None else timeout_s)
        while b"\n" not in self._heard:
            os.set_blocking(self._status, timeout_s is None)
            with contextlib.suppress(BlockingIOError):
                found = os.read(self._status, 99)
                assert found, "the process that forks others is gone"
                self._heard += found
                continue
            if time.monotonic() >= deadline_s:
                return None
            time.sleep(0.01)
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def poll(self):
        return self._ended(0)

    def wait(self, timeout=None):
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def _ended(self, timeout_s):
        if self.returncode is None and (line := self._line(timeout_s)) is not None:
            self.returncode = os.waitstatus_to_exitcode(int(line))
            os.close(self._status)
            self._said = [_read(each) for each in self._written]
        return self.returncode

    def communicate(self, timeout=None):
        """What the process wrote, once it has ended."""
        self.wait(timeout)
        return tuple(self._said)

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _read(descriptor):
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode()


def run_forked(code, *arguments, expect=None, **settings):
    """A finished process, as from `subprocess.run`, with the exit code that is expected if any."""
    process = Forked(code, *arguments, **settings)
    stdout, stderr = process.communicate()
    assert expect is None or process.returncode == expect, stderr
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@functools.cache
def _server(imported):
    """A connection to the process that forks the others, one for each set of imports."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno()), *imported],
        pass_fds=[theirs.fileno()], env=os.environ | _AT_START, start_new_session=True,
    )  # fmt: skip
    theirs.close()

    def end():
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def _serve(connection):
    """Fork a process for every request.

    Returns:
        The code to run, in that process; None in the server, once nobody asks any more.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 4)
        if not message:
            return None
        if os.fork() == 0:  # somebody has to wait for the process
            connection.close()
            *streams, status = descriptors
            if (pid := os.fork()) == 0:
                os.close(status)
                return _become(json.loads(message), streams)
            os.write(status, b"%d\n" % pid)
            os.write(status, b"%d\n" % os.waitpid(pid, 0)[1])
            os._exit(0)
        for each in descriptors:
            os.close(each)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _become(request, streams):
    if request["leads_session"]:
        os.setsid()
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["arguments"]]
    sys.path[:1] = ["", str(Path(__file__).parent)]  # as pytest finds stand-ins
    return request["code"]


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        importlib.import_module(_name)
    if (_code := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        del __file__  # children of multiprocessing would import this file
        exec(compile(_code, "<forked>", "exec"), {"__name__": "__main__"})
