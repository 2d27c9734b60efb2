"""Faults from below: full disks, few file descriptors, no home, folders that cannot be written.

    python tools/soak.py faults [--only TEXT] [--table FILE]

A case is a real command on a disk of 64 MiB (a tmpfs, which takes root), or under a limit. Where
the fault ends a command, it must do so with exit code 1 and in one line of its own, and the same
command must end well once the fault is gone; where it can be lived with, it ends with 0 at once.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import soak_stops

ROOT = soak_stops.ROOT
DISK_BYTES = 64 << 20
_FREE_BYTES = 12 << 20  # at the start of a command, which wants 8 MB
_LIMIT_S = 1200


@dataclass(frozen=True)
class Fault:
    """A command and what befalls it.

    Attributes:
        run: Command line; {disk} is the small disk, {out} a fresh path, {parts} prepared files.
        held: Function at which the disk is filled, as `module:name`; empty for none.
        line: Output of the command at which it is filled instead.
        says: Part of the command's line.
        code: Exit code with the fault.
        then: Another command that must end well after the second run.
        setting: Changes the surroundings of the first run.
    """

    name: str
    run: str
    says: str = ""
    code: int = 1
    held: str = ""
    line: str = ""
    then: str = ""
    setting: Callable[[dict[str, str]], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a fault led to."""

    fault: Fault
    exit_code: int | None
    lines: tuple[str, ...]  # of the command itself
    code_after: int | None  # of the same command without the fault; None if it was not needed
    seconds: float
    is_right: bool


def faults() -> list[Fault]:
    """All cases."""
    capture = "cache-teacher generate --engine transformers --model {parts}/teacher"
    capture += " --prompts {parts}/p.jsonl --max-new-tokens 40 --out "
    run = "train-student run --cache {parts}/cache --student {parts}/student --tracker none"
    run += " --batch-traces 4 --max-steps 6 --epochs 9 --save-every 3 --out "
    sweep = "train-student sweep --cache {parts}/cache --student {parts}/student"
    sweep += " --eval-prompts {parts}/others.jsonl --lead-spans 1.0 --baselines '' --num-seeds 1"
    sweep += " --run-options {parts}/few.toml --out "
    few = "ulimit -n 64"
    return [
        Fault(
            "disk full: a capture's journal", capture + "{disk}/cache", "No space left",
            held="teacher_cache.capture.worker_loop:finished_trace",
            then="cache-teacher verify {disk}/cache",
        ),
        Fault(
            "disk full: a capture's shard", capture + "{disk}/cache", "No space left",
            held="teacher_cache.format.writing.compaction:encode_shard",
            then="cache-teacher verify {disk}/cache",
        ),
        Fault(
            "disk full: the seal", capture + "{disk}/cache", "No space left",
            held="teacher_cache.format.writing.sealing:publish_catalog",
            then="cache-teacher verify {disk}/cache",
        ),
        Fault("disk full: before a capture", capture + "{disk}/cache", "MB left", held="before"),
        Fault(
            "disk full: a checkpoint", run + "{disk}/run", "disk",
            held="student_train.run.checkpoint_writer:_save",
        ),
        Fault(
            "disk full: the student", run + "{disk}/run", "space",
            held="student_train.run.finish:save_student",
        ),
        Fault("disk full: a sweep", sweep + "{disk}/sweep", "", line="cells, "),
        Fault(
            "disk full: a log file", capture + "{out} --log-file {disk}/log", code=0,
            held="teacher_cache.capture.worker_loop:finished_trace",
        ),
        Fault(f"{few}: capture", capture + "{out}", code=0, setting=_few_files),
        Fault(f"{few}: run", run + "{out}", code=0, setting=_few_files),
        Fault(f"{few}: verify", "cache-teacher verify {parts}/cache", code=0, setting=_few_files),
        Fault("no HOME: capture", capture + "{out}", code=0, setting=_no_home),
        Fault("no HOME: run", run + "{out}", code=0, setting=_no_home),
        Fault("an HF cache that is a file: capture", capture + "{out}", code=0, setting=_no_hub),
        Fault("an HF cache that is a file: run", run + "{out}", code=0, setting=_no_hub),
        Fault("spaces and letters: capture", capture + "'{out} é ü/x'", code=0),
        Fault("spaces and letters: run", run + "'{out} é ü/x'", code=0),
        Fault(
            "700 MB of memory: compaction", "cache-teacher seal {unsealed}", "out of memory",
            setting=_little_memory, then="cache-teacher verify {unsealed}",
        ),
    ]  # fmt: skip


def _few_files(environment: dict[str, str]) -> None:
    environment["SOAK_LIMIT"] = "NOFILE 64"


def _little_memory(environment: dict[str, str]) -> None:
    environment["SOAK_LIMIT"] = "AS 700000000"


def _no_home(environment: dict[str, str]) -> None:
    environment.pop("HOME", None)


def _no_hub(environment: dict[str, str]) -> None:
    environment["HF_HOME"] = environment["TMPDIR"] + "/said.txt"


def _limit(text: str) -> None:
    name, _, number = text.partition(" ")
    kind = getattr(resource, f"RLIMIT_{name}")
    resource.setrlimit(kind, (int(number), int(number)))


def endure(fault: Fault, parts: Path, folder: Path) -> Outcome:
    """Run a command with a fault, and again without."""
    folder.mkdir()
    disk = folder / "disk"
    names = {"parts": str(parts), "out": str(folder / "out"), "disk": str(disk)}
    names["unsealed"] = str(parts / "unsealed")
    start_s = time.monotonic()
    with ExitStack() as stack:
        if "{disk}" in fault.run:
            stack.enter_context(_mounted(disk))
        words = shlex.split(fault.run.format(**names))
        code, lines = _first_run(fault, words, disk, folder)
        text = " ".join(lines)
        own = [line for line in lines if line.startswith(f"{words[0]}: ")]
        is_right = (
            code == fault.code and fault.says in text and "Traceback" not in text
            and len(own) == (code == 1)
        )  # fmt: skip
        after = None
        if code != 0:
            (disk / "filler").unlink(missing_ok=True)
            after, lines_after = _run(words, folder, "")
            is_right &= after == 0
            own += lines_after if after else []
        if fault.then:
            is_right &= _run(shlex.split(fault.then.format(**names)), folder, "")[0] == 0
    shown = tuple(own) if is_right else tuple(lines[-6:])
    return Outcome(fault, code, shown, after, time.monotonic() - start_s, is_right)


def _first_run(
    fault: Fault, words: Sequence[str], disk: Path, folder: Path
) -> tuple[int | None, list[str]]:
    if "{disk}" not in fault.run:
        return _run(words, folder, "", setting=fault.setting)
    _fill(disk / "filler", DISK_BYTES - _FREE_BYTES)
    if fault.held == "before":
        _fill(disk / "filler", DISK_BYTES)
        return _run(words, folder, "")
    return _run(
        words, folder, fault.held, at=soak_stops.AT_THE_MOMENT if fault.held else fault.line,
        act=lambda: _fill(disk / "filler", DISK_BYTES),
    )  # fmt: skip


def _run(
    words: Sequence[str],
    folder: Path,
    held: str,
    *,
    at: str = "",
    act: Callable[[], None] = lambda: None,
    setting: Callable[[dict[str, str]], None] | None = None,
) -> tuple[int | None, list[str]]:
    """Exit code and lines of a command; `act` is called once it has said `at`."""
    said = folder / "said.txt"
    environment = soak_stops.environment(folder)
    if setting is not None:
        setting(environment)
    limit = environment.pop("SOAK_LIMIT", "")
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", soak_stops.HOLDING, held, *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=environment,
            preexec_fn=(lambda: _limit(limit)) if limit else None,
        )  # fmt: skip
    end_s = time.monotonic() + _LIMIT_S
    has_acted = not at
    while process.poll() is None and time.monotonic() < end_s:
        if not has_acted and at in said.read_text(errors="replace"):
            has_acted = True
            act()
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
        process.wait()
        return None, []
    lines = said.read_text(errors="replace").splitlines()
    return process.returncode, [line for line in lines if line != soak_stops.AT_THE_MOMENT]


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    """A small disk at a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(file: Path, num_bytes: int) -> None:
    """Make a file grow to a size, or to the end of its disk."""
    with suppress(OSError), file.open("ab") as opened:
        while (left := num_bytes - opened.tell()) > 0:
            opened.write(bytes(min(left, 1 << 16)))
            opened.flush()


def prepare(folder: Path) -> Path:
    """Make the files that commands need."""
    parts = folder / "parts"
    soak_stops.prepare(parts)
    (parts / "student").symlink_to(ROOT / "tools" / "base-student")
    (parts / "few.toml").write_text("max-steps = 2\nbatch-traces = 4\n")
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nimport soak\n"
        "from teacher_cache.format import CacheWriter, FinishedTrace\n"
        "rng = np.random.default_rng(0)\n"
        "with CacheWriter(Path(sys.argv[1]), soak.make_header()) as writer:\n"
        "    for n in range(400):\n"
        "        writer.append(FinishedTrace(soak.make_trace(f't{n}', 4000, rng), 'source'))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(parts / "unsealed")]
    subprocess.run(command, check=True, env=environment)
    return parts


def table(found: Sequence[Outcome]) -> str:
    """Markdown: a row for each fault."""
    lines = ["| fault | exit code | line | again, without it | s |", f"|{' --- |' * 5}"]
    for each in found:
        name = each.fault.name if each.is_right else f"**{each.fault.name}**"
        said = " ".join(each.lines).replace("|", "\\|")
        after = "" if each.code_after is None else str(each.code_after)
        lines.append(f"| {name} | {each.exit_code} | {said} | {after} | {each.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `soak.py faults`."""
    parser.add_argument("--only", default="", help="faults whose names hold this text")
    parser.add_argument("--table", type=Path, help="Markdown file to write")


def main(arguments: argparse.Namespace, folder: Path) -> int:
    """Let every fault happen; returns how many ended wrongly."""
    parts = prepare(folder)
    found: list[Outcome] = []
    for number, fault in enumerate(faults()):
        if arguments.only not in fault.name:
            continue
        found.append(endure(fault, parts, folder / f"fault-{number}"))
        last = found[-1]
        print(
            f"{'' if last.is_right else 'WRONG '}{fault.name:40} rc {last.exit_code} then "
            f"{last.code_after} {last.seconds:4.0f} s {list(last.lines)}",
            flush=True,
        )
    if arguments.table is not None:
        arguments.table.write_text(table(found))
    num_wrong = sum(not each.is_right for each in found)
    print(f"{len(found)} faults, {num_wrong} ended wrongly")
    return num_wrong
