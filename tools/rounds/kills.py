"""Kill -9 rounds in every stage, and compare the students with those of rounds left alone.

    python tools/rounds/kills.py OUT

Two rounds on the tiny task. Each stage of the second folder is killed once, with its children, at a
random moment after it began; the same command continues. Ends with an error if a student differs.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from teacher_cache.format.checksums import sha256_of

TOOLS = Path(__file__).parent.parent
OPTIONS = {
    "rollout": "max-new-tokens = 120\nbatch-size = 16\n",
    "score": 'engine = "transformers"\n',
    "run": 'batch-traces = 4\ndivergence = "reverse_kl"\nsave-every = 2\ntracker = "none"\n',
    "evaluate": "max-new-tokens = 120\nlimit = 40\nbatch-size = 8\n",
}
NUM_ROUNDS, PER_ROUND, LONGEST_S = 2, 48, 20.0


def command(out: Path, name: str) -> list[str]:
    """The rounds of a folder."""
    words = ["--student", TOOLS / "base-student", "--teacher", TOOLS / "tiny-teacher"]
    words += ["--prompts", TOOLS / "prompts/train.jsonl", "--prompts-per-round", PER_ROUND]
    words += ["--eval-prompts", TOOLS / "prompts/eval.jsonl", "--num-rounds", NUM_ROUNDS]
    for stage, text in OPTIONS.items():
        (out / f"{stage}.toml").write_text(text)
        words += [f"--{stage}-options", out / f"{stage}.toml"]
    program = [sys.executable, "-m", "student_train.cli", "rounds"]
    return [*program, *map(str, words), "--out", str(out / name)]


def kill_in(started: "subprocess.Popen[bytes]", folder: Path, stage: str, wait_s: float) -> bool:
    """Kill the rounds and their child some seconds after a stage has begun; False if too late."""
    log, record = folder / "log.txt", folder / f"{stage}.json"
    while not (log.exists() and f" {stage} " in log.read_text().rpartition("$ ")[2]):
        if started.poll() is not None or record.exists():
            return False
        time.sleep(0.05)
    time.sleep(wait_s)
    found = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
    was_at_work = not record.exists()
    os.kill(started.pid, signal.SIGKILL)
    for child in found.stdout.split():
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has just ended
    started.wait()
    return was_at_work


def main(out: Path) -> None:
    """Run both, and compare."""
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(out, "alone"), check=True)
    rng, killed = random.Random(0), []
    for number in range(1, NUM_ROUNDS + 1):
        for stage in OPTIONS:
            started = subprocess.Popen(command(out, "killed"))
            if kill_in(started, out / f"killed/round-{number}", stage, rng.uniform(0, LONGEST_S)):
                killed.append(f"round {number}, {stage}")
            else:
                started.wait()
    subprocess.run(command(out, "killed"), check=True)
    print(f"killed in {len(killed)} stages: {'; '.join(killed)}")
    for number in range(1, NUM_ROUNDS + 1):
        file = f"round-{number}/run/model/model.safetensors"
        same = sha256_of(out / "alone" / file) == sha256_of(out / "killed" / file)
        print(f"student of round {number}: {'the same bytes' if same else 'DIFFERENT'}")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
