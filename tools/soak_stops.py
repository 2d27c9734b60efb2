"""Every command stopped at chosen moments, by every signal, as by a terminal or a scheduler.

    python tools/soak.py stops [--only generate] [--signals INT,TERM,KILL] [--table FILE]

A case is a real process. It is stopped once it has reported its moment: one of our functions is
held for a while, or the case waits for a line of the command. The signal goes to the whole group
(Ctrl-C), to the command alone (a scheduler), or to its child. INT must end it with 130 and TERM
with 143 within LIMIT_S, in at most MAX_LINES lines after the signal. KILL is sent where a command
has children: none of its processes may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
LIMIT_S = 3.0
MAX_LINES = 3
_START_LIMIT_S = 600.0
_HELD_S = 1.0
# For processes that notice the end of the command by themselves; a sweep's write a checkpoint.
_LEAVING_S = 15.0
AT_THE_MOMENT = "at the moment"
_PROGRESS = re.compile(r"[-0-9]+ [:0-9]+ captured ")  # with its time

# Holds one of our functions until the signal has come; late imports are held late.
HOLDING = """
import importlib, importlib.abc, sys, time
target, program = sys.argv[1:3]
del sys.argv[1:3]
module_name, _, name = target.partition(":")

def hold(module):
    *path, last = name.split(".")
    owner = module
    for each in path:
        owner = getattr(owner, each)
    function = getattr(owner, last)
    def held(*args, **kwargs):
        print("at the moment", file=sys.stderr, flush=True)
        time.sleep(HELD_S)
        return function(*args, **kwargs)
    setattr(owner, last, held)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != module_name:
            return None
        sys.meta_path.remove(self)
        if not name:
            print("at the moment", file=sys.stderr, flush=True)
            time.sleep(HELD_S)
            return None
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            hold(module)
        spec.loader.exec_module = exec_module
        return spec

if module_name:
    import importlib.util
    sys.meta_path.insert(0, Finder())
sys.argv[0] = program
package = {"cache-teacher": "teacher_cache", "train-student": "student_train"}[program]
from importlib import import_module
cli = import_module(package + ".cli")
(cli.program if package == "teacher_cache" else cli.main)()
""".replace("HELD_S", str(_HELD_S))


@dataclass(frozen=True)
class Moment:
    """Moment at which a command is stopped.

    Attributes:
        command: The program and its arguments; {out} is a fresh folder or file.
        name: Name of the moment.
        held: Function that is held, as `module:name`, or module whose import is; empty for none.
        line: Output of the command at the moment; empty to wait `delay_s` from its start.
        delay_s: Further wait.
        with_child: Whether it then has children that a signal may go to.
        needs_child: Whether it needs all of them to continue; a sweep begins another cell.
        num_holds: Number of holds in work that must end first; each adds _HELD_S to the limit.
    """

    command: tuple[str, ...]
    name: str
    held: str = ""
    line: str = ""
    delay_s: float = 0.0
    with_child: bool = False
    needs_child: bool = True
    num_holds: int = 0


# Starts a process in a session of its own, with its output in a file.
Start = Callable[[Sequence[str], IO[bytes], Path], "subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Stop:
    """Outcome of one stop."""

    command: str
    moment: str
    signal: str
    to: str  # group, command, child
    exit_code: int | None  # None: it had to be killed
    seconds: float
    lines: tuple[str, ...]  # after the signal
    num_left: int  # processes
    is_right: bool
    load: float  # of the machine over the last minute


def start(words: Sequence[str], file: IO[bytes], folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs HOLDING with these arguments, its output in a file."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDING, *words],
        stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
        env=environment(folder),
    )  # fmt: skip


def stop(
    moment: Moment, signal_name: str, to: str, folder: Path, *,
    limit_s: float = LIMIT_S, start: Start = start,
) -> Stop:  # fmt: skip
    """Start a command, stop it at its moment, and see how it ends within `limit_s`."""
    folder.mkdir(parents=True)
    said = folder / "said.txt"
    words = [word.format(out=folder / "out") for word in moment.command]
    with said.open("wb") as file:
        process = start((moment.held, *words), file, folder)
    try:
        _wait_for(moment, process, said)
        before = said.read_text(errors="replace")
        family = list(_descendants(process.pid))
        number = getattr(signal, f"SIG{signal_name}")
        start_s = time.monotonic()
        _send(number, to, process.pid, family)
        code, seconds = _ended(process, start_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = _left(family)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    after = said.read_text(errors="replace")[len(before) :].splitlines()
    # Progress is a line every 10 s, whatever happens: it is not of the stop.
    lines = tuple(x for x in after if x != AT_THE_MOMENT and not _PROGRESS.match(x))
    expected = {"INT": 130, "TERM": 143, "KILL": -9}[signal_name] if to != "child" else 1
    limit_s += _HELD_S * moment.num_holds
    is_right = (
        code == expected and seconds <= limit_s and not left and len(lines) <= MAX_LINES
        and "Traceback" not in "".join(lines)
    )  # fmt: skip
    return Stop(
        " ".join(moment.command[:2]), moment.name, signal_name, to, code, round(seconds, 2), lines,
        len(left), is_right, os.getloadavg()[0],
    )  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Surroundings of a case; its logs, which a kill leaves behind, go into its folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    # vLLM's sockets stay where they were: their paths may have 107 characters only.
    folders = {"TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": tempfile.gettempdir()}
    return os.environ | settings | folders | {"PYTHONPATH": path}


def _wait_for(moment: Moment, process: subprocess.Popen[bytes], said: Path) -> None:
    line = AT_THE_MOMENT if moment.held else moment.line
    end_s = time.monotonic() + _START_LIMIT_S
    while line and line not in said.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > end_s:
            text = said.read_text(errors="replace")
            raise RuntimeError(f"{moment.command[1]} never reached {moment.name!r}: {text}")
        time.sleep(0.02)
    while moment.with_child and not _engine(_descendants(process.pid)):
        time.sleep(0.02)
    time.sleep(moment.delay_s)


def _send(number: int, to: str, pid: int, family: Sequence[int]) -> None:
    if to == "group":
        os.killpg(pid, number)
    else:
        os.kill(pid if to == "command" else _engine(family)[0], number)


def _ended(process: subprocess.Popen[bytes], start_s: float) -> tuple[int | None, float]:
    code: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(20)
    return code, time.monotonic() - start_s


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _engine(family: Iterator[int] | Sequence[int]) -> list[int]:
    """Processes that do the work: not waiting shells, not multiprocessing's tracker."""
    found = []
    for pid in family:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"spawn_main" in words or b"student_train.cli" in words or b"EngineCore" in words:
                found.append(pid)
    return found


def _left(family: Sequence[int]) -> list[int]:
    """Those that are still alive when a guard or a tracker has had its time to notice."""
    end_s = time.monotonic() + _LEAVING_S
    while (left := [pid for pid in family if _is_alive(pid)]) and time.monotonic() < end_s:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            print(f"left: {pid} {words.decode(errors='replace')[:200]}", flush=True)
    return left


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def moments(parts: Path) -> list[Moment]:
    """All moments; `parts` is the folder that `prepare` has filled."""
    teacher, prompts, cache = (str(parts / name) for name in ("teacher", "p.jsonl", "cache"))
    capture = ("cache-teacher", "generate", "--model", teacher, "--prompts", prompts)
    small = (*capture, "--engine", "transformers", "--max-new-tokens", "20", "--out", "{out}")
    vllm = (*capture, "--max-new-tokens", "20", "--out", "{out}")
    run = (
        "train-student", "run", "--cache", cache, "--student", teacher, "--out", "{out}",
        "--batch-traces", "4", "--tracker", "none", "--max-steps", "50", "--epochs", "50",
    )  # fmt: skip
    evaluate = ("train-student", "evaluate", "--model", teacher, "--prompts", prompts)
    sweep = (
        "train-student", "sweep", "--cache", cache, "--student", teacher, "--out", "{out}",
        "--eval-prompts", str(parts / "others.jsonl"), "--lead-spans", "0.5,1.0", "--baselines", "",
        "--run-options", str(parts / "run.toml"), "--num-seeds", "1",
    )  # fmt: skip
    audit = ("cache-teacher", "audit", cache, "--model", teacher)
    return [
        Moment(small, "first import", "teacher_cache.terminal.entry"),
        Moment(small, "imports", "numpy"),
        Moment(small, "heavy imports", "transformers"),
        Moment(small, "reading input", "teacher_cache.capture.prepare:run_job"),
        Moment(small, "survey", "teacher_cache.capture.job:Job.is_ours"),
        Moment(small, "generating", "teacher_cache.engines.transformers:check_rows"),
        Moment(
            small, "keeping a trace", "teacher_cache.capture.worker_loop:finished_trace",
            num_holds=1,
        ),
        Moment(small, "compaction", "teacher_cache.format.writing.compaction:encode_shard"),
        Moment(small, "seal", "teacher_cache.format.writing.sealing:publish_catalog"),
        Moment(vllm, "engine start", line="starting vllm", delay_s=1.0),
        Moment(vllm, "engine's process", line="starting vllm", with_child=True, delay_s=3.0),
        Moment(
            vllm, "engine running", "teacher_cache.engines.vllm.requests:check_rows",
            with_child=True,
        ),
        Moment(("cache-teacher", "verify", cache), "verify",
               "teacher_cache.format.checking.verify:broken_shard"),
        Moment(("cache-teacher", "inspect", cache), "inspect",
               "teacher_cache.examine.measured:measure_entries"),
        Moment(("cache-teacher", "export", cache, "{out}.jsonl"), "export",
               "teacher_cache.transform.export:_row"),
        Moment(("cache-teacher", "truncate", cache, "{out}"), "truncate",
               "teacher_cache.transform.truncate:_copy_shard"),
        Moment(audit, "audit", "teacher_cache.examine.audit:_compare"),
        Moment(run, "first import", "teacher_cache.terminal.entry"),
        Moment(run, "heavy imports", "torch"),
        Moment(run, "loading", "student_train.run.student:load_model"),
        Moment(run, "first step", "student_train.run.loop:global_counts", num_holds=1),
        Moment(
            (*run, "--save-every", "1"), "checkpoint", "student_train.run.checkpoint_writer:_save",
            num_holds=2,
        ),
        Moment(run, "student", "student_train.run.finish:save_student"),
        Moment(evaluate, "heavy imports", "transformers"),
        Moment(evaluate, "generating", "student_train.evaluation.generation:_complete"),
        Moment(sweep, "heavy imports", "torch"),
        Moment(
            sweep, "cells", line="cells, ", with_child=True, needs_child=False, delay_s=2.0
        ),
        Moment(sweep, "report", "student_train.sweep.protocol:write_report"),
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """A teacher, prompts, and a cache that all commands use."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher").symlink_to(ROOT / "tools" / "tiny-teacher")
    rows = (ROOT / "tools" / "prompts" / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "p.jsonl").write_text("".join(rows[:24]))
    (folder / "others.jsonl").write_text("".join(rows[100:104]))
    (folder / "run.toml").write_text("max-steps = 400\nepochs = 400\nbatch-traces = 4\n")
    command = [
        sys.executable, "-c", HOLDING, "", "cache-teacher", "generate", "--engine", "transformers",
        "--model", str(folder / "teacher"), "--prompts", str(folder / "p.jsonl"),
        "--out", str(folder / "cache"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=environment(folder), check=True, capture_output=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        default="",
        help="texts with commas between them, of commands and moments",
    )
    parser.add_argument("--signals", default="INT,TERM,KILL")
    parser.add_argument("--table", type=Path, help="Markdown file to write")


def table(stops: Sequence[Stop]) -> str:
    """Markdown: a row for each moment of a command, a column for each signal and its target."""
    columns = list(dict.fromkeys((each.signal, each.to) for each in stops))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for each in stops:
        cell = f"{each.exit_code}, {each.seconds:.1f} s, {len(each.lines)}"
        cell += f", {each.num_left} left" if each.num_left else ""
        row = rows.setdefault((each.command, each.moment), {})
        row[each.signal, each.to] = cell if each.is_right else f"**{cell}**"
    loads = [each.load for each in stops]
    head = ["command", "moment", *(f"{name} to {to}" for name, to in columns)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for (command, moment), cells in rows.items():
        words = [command, moment, *(cells.get(column, "") for column in columns)]
        lines.append(f"| {' | '.join(words)} |")
    num_wrong = sum(not each.is_right for each in stops)
    lines.append(
        f"\n{len(stops)} stops, {num_wrong} wrong (in bold); load of the machine "
        f"{min(loads):.1f} to {max(loads):.1f}."
    )
    return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace, folder: Path) -> int:
    """Stop every command at each of its moments; returns how many ended wrongly."""
    prepare(folder / "parts")
    stops: list[Stop] = []
    for moment in moments(folder / "parts"):
        title = f"{' '.join(moment.command[:2])} {moment.name}"
        if not any(text in title for text in arguments.only.split(",")):
            continue
        for name in arguments.signals.split(","):
            if name == "KILL" and not moment.with_child:
                continue
            for to in (
                "group",
                "command",
                *(("child",) if moment.with_child and moment.needs_child else ()),
            ):
                try:
                    done = stop(moment, name, to, folder / f"stop-{len(stops)}")
                except RuntimeError as error:  # it never reached the moment
                    words = (moment.command[0] + " " + moment.command[1], moment.name, name, to)
                    done = Stop(*words, None, 0.0, (str(error),), 0, False, os.getloadavg()[0])
                stops.append(done)
                print(
                    f"{'' if done.is_right else 'WRONG '}{title:40} {name:4} {to:7} "
                    f"rc {done.exit_code} {done.seconds:5.2f} s {len(done.lines)} lines "
                    f"{done.num_left} left  {done.lines[-1:]}",
                    flush=True,
                )
    if arguments.table is not None:
        arguments.table.write_text(table(stops))
    num_wrong = sum(not each.is_right for each in stops)
    print(f"{len(stops)} stops, {num_wrong} wrong")
    return num_wrong
