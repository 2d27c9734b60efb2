"""A training run killed again and again: in the end the same student, to the last bit.

    PYTHONPATH=.:tests python tests/train_kills.py --kills 200 --seed 0

Every attempt is a process of its own, killed (SIGKILL) at a random moment of the time that a whole
run takes; a checkpoint is written after every second step, so that many are killed while they
write one. A run that has finished is compared with an undisturbed one, and the next begins.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from fakes import make_cache, make_traces
from same_bits import assert_bitwise_equal
from students import make_student

from student_train.run.config import TrainConfig
from student_train.run.loop import train

RUNS = multiprocessing.get_context("forkserver")  # a process that has imported all this forks
RUNS.set_forkserver_preload(["train_kills"])
NUM_STEPS = 40


@dataclass
class Outcome:
    """What the kills hit, and what was found."""

    num_kills: int = 0
    while_writing: int = 0  # of these, with a checkpoint or the student half written
    before_a_checkpoint: int = 0  # of these, with nothing to go on with
    num_runs: int = 0  # finished and compared
    findings: list[str] = field(default_factory=list)


def work(config):
    torch.set_num_threads(1)
    train(config)


def started(config):
    process = RUNS.Process(target=work, args=(config,))
    process.start()
    return process


def kill_trainings(folder, num_kills, *, seed):
    """Kill runs until there were so many kills, and let the last one finish."""
    rng = random.Random(seed)
    whole = TrainConfig(
        cache=(make_cache(folder / "cache", make_traces(40)),),
        student=make_student(folder / "student", attention_dropout=0.1), out=folder / "whole",
        lr=3e-3, batch_traces=4, epochs=4, max_steps=NUM_STEPS, save_every=2, keep_last=2,
        heldout_share=0.1, eval_every=5, select="heldout", tracker="none",
    )  # fmt: skip
    started(replace(whole, out=folder / "warm", max_steps=1)).join()  # the imports
    started_s = time.monotonic()
    started(whole).join()
    whole_s = time.monotonic() - started_s
    outcome = Outcome()
    while outcome.num_kills < num_kills or not outcome.num_runs:
        run = replace(whole, out=folder / f"run-{outcome.num_runs:04d}")
        finish(run, outcome, num_kills, rng, whole_s)
        outcome.num_runs += 1
        outcome.findings += differences(whole.out, run.out)
        shutil.rmtree(run.out)
    return outcome


def finish(run, outcome, num_kills, rng, whole_s):
    """Start a run again and again until it finishes."""
    while True:
        process = started(run)
        process.join(rng.uniform(0, whole_s) if outcome.num_kills < num_kills else None)
        if process.exitcode is not None:
            if process.exitcode:
                outcome.findings.append(f"{run.out}: ended with {process.exitcode}")
            return
        process.kill()
        process.join()
        outcome.num_kills += 1
        outcome.while_writing += any(run.out.glob(".tmp-*")) or any(run.out.glob("*/.tmp-*"))
        outcome.before_a_checkpoint += not any(run.out.glob("checkpoints/step-*"))


def differences(one, other):
    """What differs between two finished runs."""
    try:
        for file in ("model/model.safetensors", "model/config.json"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
        checkpoints = [sorted(run.glob("checkpoints/*")) for run in (one, other)]
        assert [path.name for path in checkpoints[0]] == [path.name for path in checkpoints[1]]
        for left, right in zip(*checkpoints, strict=True):
            for file in ("state.pt", "random-00000.pt"):
                assert_bitwise_equal(
                    *[torch.load(path / file, weights_only=True) for path in (left, right)]
                )
        assert figures(one) == figures(other), "metrics.jsonl"
    except (AssertionError, OSError) as error:
        return [f"{other}: {error}"]
    return []


def figures(run):
    names = ("step", "loss", "grad_norm", "tokens", "heldout_kl")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line).get(name) for name in names] for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_trainings(Path(folder), arguments.kills, seed=arguments.seed)
    sys.stdout.write(f"{outcome}\n")
    sys.exit(1 if outcome.findings else 0)


if __name__ == "__main__":
    main()
