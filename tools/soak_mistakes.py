"""Ordinary mistakes of users: how soon each is found, and in how many lines.

    python tools/soak.py mistakes [--only TEXT] [--table FILE]

`mistakes.toml` lists them. Each must end with its exit code, without a traceback, and with one line
of the program that names what is wrong; a wrong usage has at most MAX_LINES. Lines of progress
before it are not counted. Processor seconds say how much had to be imported and read; seconds of
the clock depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soak_stops

ROOT = soak_stops.ROOT
MAX_LINES = 6
_LIMIT_S = 600
_PROGRAM = {
    "cache-teacher": "from teacher_cache.cli import program; program()",
    "train-student": "from student_train.cli import main; main()",
}


@dataclass(frozen=True)
class Mistake:
    """A command with a mistake, and what it must say.

    Attributes:
        run: Command line with names of prepared files in braces.
        says: Part of the message.
        code: Exit code.
        before: Seconds or words measured before there were early checks.
    """

    name: str
    run: str
    says: str
    code: int = 1
    before: str = ""


@dataclass(frozen=True)
class Found:
    """How a mistake was found."""

    mistake: Mistake
    exit_code: int | None  # None: not within _LIMIT_S
    cpu_s: float
    wall_s: float
    lines: tuple[str, ...]
    is_right: bool
    load: float


def make(mistake: Mistake, names: dict[str, str], folder: Path) -> Found:
    """Run one command with a mistake."""
    folder.mkdir()
    program, *words = shlex.split(_filled(mistake.run, names | {"out": str(folder / "out")}))
    said = folder / "said.txt"
    start_s = time.monotonic()
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM[program], *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=_environment(folder),
        )  # fmt: skip
    code, cpu_s = _ended(process, start_s)
    wall_s = time.monotonic() - start_s
    lines = tuple(said.read_text(errors="replace").splitlines())
    # Lines of progress stand before the message if the machine is slow.
    start = f"{program}: " if mistake.code == 1 else "Usage: "
    first = next((n for n, line in enumerate(lines) if line.startswith(start)), len(lines))
    of_error = lines[first:]
    text = " ".join(" ".join(of_error).split())
    is_right = (
        code == mistake.code and mistake.says in text and "Traceback" not in "".join(lines)
        and 0 < len(of_error) <= (1 if code == 1 else MAX_LINES)
    )  # fmt: skip
    shown = of_error or lines
    return Found(mistake, code, cpu_s, wall_s, shown, is_right, os.getloadavg()[0])


def _filled(text: str, names: dict[str, str]) -> str:
    while "{" in text:
        text = text.format_map(names)
    return text


def _environment(folder: Path) -> dict[str, str]:
    """The user's, without network and logins."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("WANDB_", "HF_", "AWS_"))}
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "NETRC": "/nowhere"}
    # Nobody listens on the port: as a machine without network, but refused at once.
    settings |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hf")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return kept | settings | {"PYTHONPATH": path, "TMPDIR": str(folder)}


def _ended(process: subprocess.Popen[bytes], start_s: float) -> tuple[int | None, float]:
    """Exit code, and processor seconds of the process and the children that it waited for."""
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, used.ru_utime + used.ru_stime
        if time.monotonic() - start_s > _LIMIT_S:
            process.kill()
            process.wait()
            return None, 0.0
        time.sleep(0.02)


def prepare(folder: Path) -> dict[str, str]:
    """Make the files that mistakes need; returns their names in `mistakes.toml`."""
    parts = folder / "parts"
    soak_stops.prepare(parts)
    rows = (parts / "p.jsonl").read_text()
    (parts / "notes").mkdir()
    (parts / "notes" / "diary.md").write_text("mine\n")
    files = {
        "file": b"mine\n",
        "empty.jsonl": b"",
        "binary.jsonl": bytes(range(200)),
        "utf16.jsonl": rows.encode("utf-16"),
        "misnamed.parquet": rows.encode(),
        "columns.jsonl": rows.replace('"messages"', '"mesages"').encode(),
        "badline.jsonl": rows.encode() + b'{"messages": \n',
        "long.jsonl": b'{"id": "long", "prompt": "%s"}\n' % (b"Sum of $47 $24? " * 2000),
        "unanswered.jsonl": rows.replace('"answer"', '"anser"').encode(),
        "captureconfig.toml": b"modle = 'x'\n",
        "badconfig.toml": b"batch-trace = 1\n",
    }
    for name, content in files.items():
        (parts / name).write_bytes(content)
    os.mkfifo(parts / "fifo")
    names = _names(parts)
    good = (
        "cache-teacher truncate {cache} {half} --lead-span 0.5",
        "{train} --max-steps 2 --out {run}",
    )
    for number, command in enumerate(good):
        done = make(Mistake("", command, "", code=0), names, folder / f"good-{number}")
        if done.exit_code != 0:
            raise RuntimeError(f"{command}: {done.lines}")
    shutil.copytree(parts / "run", parts / "unfinished", ignore=shutil.ignore_patterns("model"))
    shutil.copytree(parts / "cache", parts / "damaged")
    (shard,) = (parts / "damaged" / "shards").glob("*.arrow")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 4] ^= 1
    shard.write_bytes(damaged)
    return names


def _names(parts: Path) -> dict[str, str]:
    names = {path.name.partition(".")[0]: str(path) for path in parts.iterdir()}
    names |= {name: str(parts / name) for name in ("half", "run", "unfinished", "damaged")}
    names |= {"parts": str(parts), "prompts": names["p"], "student": "tools/base-student"}
    capture = "cache-teacher generate --model {teacher} --prompts {prompts}"
    names |= {"generate_vllm": capture, "generate": f"{capture} --engine transformers"}
    names["train"] = "train-student run --cache {cache} --student {student} --tracker none"
    names["sweep"] = "train-student sweep --cache {cache} --student {student} --out {out}"
    names["sweep"] += " --eval-prompts {others}"
    return names | {"port": str(_free_port())}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listed() -> list[Mistake]:
    """All mistakes of `mistakes.toml`."""
    content = tomllib.loads((ROOT / "tools" / "mistakes.toml").read_text())
    return [Mistake(**each) for each in content["mistake"]]


def table(found: Sequence[Found]) -> str:
    """Markdown: a row for each mistake."""
    lines = [
        "| mistake | before, s | processor, s | clock, s | exit code | lines |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        name = each.mistake.name.replace("|", "\\|")
        words = (
            name if each.is_right else f"**{name}**", each.mistake.before, f"{each.cpu_s:.1f}",
            f"{each.wall_s:.1f}", str(each.exit_code), str(len(each.lines)),
        )  # fmt: skip
        lines.append(f"| {' | '.join(words)} |")
    loads, num_wrong = [each.load for each in found], sum(not each.is_right for each in found)
    seconds = sorted(each.cpu_s for each in found)
    lines.append(
        f"\n{len(found)} mistakes, {num_wrong} found wrongly (in bold); processor seconds: median "
        f"{seconds[len(seconds) // 2]:.1f}, largest {seconds[-1]:.1f}; load of the machine "
        f"{min(loads):.1f} to {max(loads):.1f}."
    )
    return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `soak.py mistakes`."""
    parser.add_argument("--only", default="", help="mistakes whose names hold this text")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--parallel", type=int, default=1, help="mistakes made at a time")


def main(arguments: argparse.Namespace, folder: Path) -> int:
    """Make every mistake; returns how many were found wrongly."""
    names = prepare(folder)
    chosen = [mistake for mistake in listed() if arguments.only in mistake.name]

    def made(number: int) -> Found:
        return make(chosen[number], names, folder / f"mistake-{number}")

    found: list[Found] = []
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for last in pool.map(made, range(len(chosen))):
            found.append(last)
            print(
                f"{'' if last.is_right else 'WRONG '}{last.mistake.name:45} rc {last.exit_code} "
                f"{last.cpu_s:5.2f} s {last.wall_s:6.2f} s {len(last.lines)} lines "
                f"{last.lines[-1:] if last.is_right else last.lines[-8:]}",
                flush=True,
            )
    if arguments.table is not None:
        arguments.table.write_text(table(found))
    num_wrong = sum(not each.is_right for each in found)
    print(f"{len(found)} mistakes, {num_wrong} found wrongly")
    return num_wrong
