"""One process of a run of four killed again and again: in the end the same student.

    PYTHONPATH=.:tests python tests/rank_kills.py --kills 50 --seed 0

Every attempt is four gloo processes, of which one is killed (SIGKILL) at a random moment of the
time that a whole run takes; a checkpoint is written after every second step. The others have to end
on their own, each with one error that says so, and within `LIMIT_S`. The same run is started again
until it finishes, then compared with an undisturbed one: student, checkpoints of every process and
metrics to the last bit. Runs take turns in having a copy of the student in every process, and in
splitting it.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import train_multiprocess
from fakes import make_cache, make_traces
from processes import free_port
from same_bits import assert_bitwise_equal
from students import make_student
from train_kills import RUNS, figures

from student_train.run import lifeline
from student_train.run.config import TrainConfig

RUNS.set_forkserver_preload(["rank_kills"])
NUM_RANKS = 4
NUM_STEPS = 16
LIMIT_S = 30.0  # for the others to notice and end
JOIN_S = 20.0  # in place of minutes, or a process that is killed before it joins takes as long


@dataclass
class Outcome:
    """What the kills hit, and what was found."""

    num_kills: int = 0
    of_main: int = 0  # of these, the process that owns the folder
    while_writing: int = 0  # of these, with a checkpoint or the student half written
    before_a_checkpoint: int = 0  # of these, with nothing to go on with
    slowest_end_s: float = 0.0  # from a kill to the end of the last of the others
    endings: Counter[str] = field(default_factory=Counter)  # of the others
    num_runs: int = 0  # finished and compared
    findings: list[str] = field(default_factory=list)


def work(rank, port, config, said):
    torch.set_num_threads(1)
    lifeline.JOIN_S = JOIN_S
    lifeline.say = (said / f"{rank}").write_text  # what it says as it ends the process
    try:
        train_multiprocess.run(rank, NUM_RANKS, [port], [config], None, NUM_RANKS)
    except Exception as error:
        (said / f"{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None  # as the command ends, without a traceback


def started(config, said):
    port = free_port()
    processes = [
        RUNS.Process(target=work, args=(rank, port, config, said)) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    return processes


def kill_ranks(folder, num_kills, *, seed, limit_s, within_s):
    """Kill processes until there were so many kills, or for so long; let the last run finish.

    Each is killed within the time that a whole run takes, or within `within_s` if that is less.
    """
    until_s = time.monotonic() + limit_s
    rng, outcome = random.Random(seed), Outcome()
    said = folder / "said"
    said.mkdir()
    cache = make_cache(folder / "cache", make_traces(40))
    wholes = {}
    for sharding, tied in (("none", False), ("full", True)):
        student = folder / f"student{'-tied' if tied else ''}"
        config = TrainConfig(
            cache=(cache,), student=make_student(student, tied=tied, attention_dropout=0.1),
            out=folder / f"whole-{sharding}", lr=3e-3, batch_traces=8, epochs=4,
            max_steps=NUM_STEPS, save_every=2, keep_last=2, heldout_share=0.1, eval_every=5,
            select="heldout", tracker="none", sharding=sharding,
        )  # fmt: skip
        warm = replace(config, out=folder / f"warm-{sharding}", max_steps=1)  # the imports
        for run in (warm, config):
            started_s = time.monotonic()
            for process in started(run, said):
                process.join()
            whole_s = min(time.monotonic() - started_s, within_s)
        wholes[sharding] = config, whole_s
    while outcome.num_kills < num_kills and time.monotonic() < until_s:
        whole, whole_s = wholes[("none", "full")[outcome.num_runs % 2]]
        run = replace(whole, out=folder / f"run-{outcome.num_runs:04d}")
        finish(run, outcome, num_kills, rng, whole_s, said, until_s)
        outcome.num_runs += 1
        outcome.findings += differences(whole.out, run.out)
        shutil.rmtree(run.out)
    return outcome


def finish(run, outcome, num_kills, rng, whole_s, said, until_s):
    """Start a run again and again until it finishes."""
    while True:
        processes = started(run, said)
        victim = rng.randrange(NUM_RANKS)
        is_last = outcome.num_kills >= num_kills or time.monotonic() > until_s
        processes[victim].join(None if is_last else rng.uniform(0, whole_s))
        if processes[victim].exitcode is None:
            processes[victim].kill()
            note_kill(run, outcome, processes, victim, said)
            continue
        for process in processes:
            process.join(LIMIT_S)
        if all(process.exitcode == 0 for process in processes):
            return
        outcome.findings.append(f"{run.out}: {[process.exitcode for process in processes]}")
        outcome.findings += [file.read_text() for file in said.iterdir()]
        return


def note_kill(run, outcome, processes, victim, said):
    """Wait for the others, and count what happened."""
    killed_s = time.monotonic()
    outcome.num_kills += 1
    outcome.of_main += victim == 0
    outcome.while_writing += any(run.out.glob(".tmp-*")) or any(run.out.glob("*/.tmp-*"))
    outcome.before_a_checkpoint += not any(run.out.glob("checkpoints/step-*"))
    for rank, process in enumerate(processes):
        process.join(max(0.0, killed_s + LIMIT_S - time.monotonic()))
        if process.exitcode is None:
            outcome.findings.append(f"{run.out}: process {rank} hangs")
            process.kill()
            process.join()
        message = said / f"{rank}"
        if rank == victim:
            pass
        elif process.exitcode == 0:
            outcome.endings["finished"] += 1
        elif message.exists():
            outcome.endings[re.sub(r"process [\d, ]+|on \S+", "#", message.read_text())[:60]] += 1
        else:
            outcome.findings.append(f"{run.out}: process {rank} ended without a word")
        message.unlink(missing_ok=True)
    outcome.slowest_end_s = max(outcome.slowest_end_s, time.monotonic() - killed_s)


def differences(one, other):
    """What differs between two finished runs: files of the student and of every checkpoint."""
    try:
        for name in ("model/model.safetensors", "model/config.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        found = [sorted(run.glob("checkpoints/*/**/*.*")) for run in (one, other)]
        names = [
            [path.relative_to(run) for path in paths]
            for run, paths in zip((one, other), found, strict=True)
        ]
        assert names[0] == names[1], names
        for left, right in zip(*found, strict=True):
            if left.suffix == ".distcp":
                assert left.read_bytes() == right.read_bytes(), right
            elif left.suffix == ".pt":
                states = [torch.load(path, weights_only=True) for path in (left, right)]
                assert_bitwise_equal(*states)
        assert figures(one) == figures(other), "metrics.jsonl"
    except (AssertionError, OSError) as error:
        return [f"{other}: {error}"]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--within-s", type=float, default=float("inf"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_ranks(
            Path(folder),
            arguments.kills,
            seed=arguments.seed,
            limit_s=arguments.limit_s,
            within_s=arguments.within_s,
        )
    sys.stdout.write(json.dumps(outcome.__dict__, indent=1) + "\n")
    sys.exit(1 if outcome.findings else 0)


if __name__ == "__main__":
    main()
