"""Kill -9 rounds in every stage, and compare what they end with to rounds left alone.

    python tools/rounds/kills.py OUT [KILLS_PER_STAGE]

Two rounds on the tiny task, first left alone, then again in the same place. There each stage is
killed at random moments of the time that it took alone: the rounds, the stage's command, or both.
The same command continues. Ends with an error if a student, a trace or an answer differs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from teacher_cache.format.checksums import sha256_of
from teacher_cache.format.folder_lock import LOCK_NAME, FolderLock

TOOLS = Path(__file__).parent.parent
OPTIONS = {
    "rollout": "max-new-tokens = 120\nbatch-size = 16\n",
    "score": 'engine = "transformers"\n',
    "run": 'batch-traces = 4\ndivergence = "reverse_kl"\nsave-every = 2\ntracker = "none"\n',
    "evaluate": "max-new-tokens = 120\nlimit = 40\nbatch-size = 8\n",
}
NUM_ROUNDS, PER_ROUND = 2, 48
VICTIMS = ("the rounds", "the command", "both")


def command(out: Path) -> list[str]:
    """The rounds of OUT/rounds; caches name it, so both runs have this place."""
    words = ["--student", TOOLS / "base-student", "--teacher", TOOLS / "tiny-teacher"]
    words += ["--prompts", TOOLS / "prompts/train.jsonl", "--prompts-per-round", PER_ROUND]
    words += ["--eval-prompts", TOOLS / "prompts/eval.jsonl", "--num-rounds", NUM_ROUNDS]
    for stage, text in OPTIONS.items():
        (out / f"{stage}.toml").write_text(text)
        words += [f"--{stage}-options", out / f"{stage}.toml"]
    program = [sys.executable, "-m", "student_train.cli", "rounds"]
    return [*program, *map(str, words), "--out", str(out / "rounds")]


def stages() -> list[str]:
    """Folder and name of every stage, in order."""
    rounds = [f"round-{n}/{stage}" for n in range(1, NUM_ROUNDS + 1) for stage in OPTIONS]
    return ["start/evaluate", *rounds]


def child_at_work(pid: int, stage: str) -> int | None:
    """Process id of the stage's command, a child of the rounds."""
    found = subprocess.run(["pgrep", "-a", "-P", str(pid)], capture_output=True, text=True)
    for line in found.stdout.splitlines():
        if f" {stage} " in f"{line} ":
            return int(line.split()[0])
    return None


def kill_in(out: Path, stage: str, wait_s: float, victim: str) -> bool:
    """Start the rounds, and kill them some seconds after a stage has begun; False if too late."""
    record = out / "rounds" / f"{stage}.json"
    with (out / "killed.log").open("ab") as log:
        rounds = subprocess.Popen(command(out), stdout=log, stderr=log)
    while (child := child_at_work(rounds.pid, stage.partition("/")[2])) is None:
        if rounds.poll() is not None:
            raise SystemExit(f"{stage} never began: see {out / 'killed.log'}")
        time.sleep(0.05)
    time.sleep(wait_s)
    was_at_work = not record.exists()
    chosen = {"the rounds": [rounds.pid], "the command": [child]}
    for pid in chosen.get(victim, [rounds.pid, child]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has just ended
    if not was_at_work:
        os.kill(rounds.pid, signal.SIGKILL)  # in the next stage, whose turn comes
    rounds.wait()
    with FolderLock(out / "rounds" / LOCK_NAME, wait=True):
        return was_at_work  # the guard has ended what the rounds left behind


def contents(folder: Path) -> dict[str, object]:
    """What rounds end with: students, traces and answers, wherever they stopped meanwhile."""
    found: dict[str, object] = {}
    for number in range(1, NUM_ROUNDS + 1):
        part = folder / f"round-{number}"
        found[f"student of round {number}"] = sha256_of(part / "run/model/model.safetensors")
        found[f"traces of round {number}"] = sorted(
            (row["id"], row["token_ids"], row["student_logprobs"])
            for row in map(json.loads, (part / "rollouts.jsonl").read_text().splitlines())
        )
        found[f"answers of round {number}"] = sorted(
            (row["prompt"], row["completion"]["text"])
            for row in map(json.loads, (part / "completions.jsonl").read_text().splitlines())
        )
    return found


def main(out: Path, per_stage: int) -> None:
    """Run both, and compare."""
    out.mkdir(parents=True, exist_ok=True)
    alone = out / "alone"
    if not alone.exists():
        subprocess.run(command(out), check=True)
        (out / "rounds").rename(alone)
    rng, killed = random.Random(0), Counter[str]()
    for stage in stages():
        seconds = json.loads((alone / f"{stage}.json").read_text())["seconds"]
        for number in range(per_stage):
            victim = VICTIMS[(number + len(killed)) % len(VICTIMS)]
            if (out / "rounds" / f"{stage}.json").exists():
                break
            killed[stage] += kill_in(out, stage, rng.uniform(0, seconds), victim)
    subprocess.run(command(out), check=True)
    print(f"{killed.total()} kills in {len(+killed)} of {len(stages())} stages: {dict(killed)}")
    expected, found = contents(alone), contents(out / "rounds")
    for name in expected:
        print(f"{name}: {'the same' if found[name] == expected[name] else 'DIFFERENT'}")
    if found != expected:
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
