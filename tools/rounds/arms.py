"""Rounds on own traces against more of the teacher's, on the tiny task: arms paired by seed.

    python tools/rounds/arms.py OUT [NUM_SEEDS [ARMS]]

Every seed has its own student, warmed up on the teacher's traces. From there each arm trains for as
many steps on as many traces of the same prompts; what differs is who wrote them and what is learned
from them. In one process, one stage after the other; run again to continue. OUT/results.json has a
line per arm and seed.

    off-policy    traces that the teacher wrote
    one-scalar    the student's own, policy gradient on the teacher's logprob of each token
    reverse       the student's own, reverse KL over the whole distributions
    forward       the student's own, forward KL over the whole distributions
    short         the student's own, no more than 48 tokens of each, reverse KL
    fresh         as reverse, in four rounds of a quarter of the traces each
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.evaluate import evaluate
from student_train.rounds.figures import OwnFigures
from student_train.rounds.rollout import roll_out
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.capture.configs import ScoreConfig
from teacher_cache.capture.score import score
from teacher_cache.format import open_cache
from teacher_cache.format.files import publish

TOOLS = Path(__file__).parent.parent
TEACHER, BASE = str(TOOLS / "tiny-teacher"), str(TOOLS / "base-student")
NUM_WARM, NUM_ARM, NUM_HELDOUT, NUM_EVAL = 384, 256, 48, 250
BATCH, MAX_NEW_TOKENS, SHORT_TOKENS = 16, 180, 48
WARM_UP = {"lr": 1e-3, "schedule": "linear", "warmup": 0.05}
# All arms: own tokens have no cross entropy, and the teacher's traces here none either.
ARM = {"lr": 5e-4, "schedule": "constant", "warmup": 0.1, "ce_weight": 0.0, "epochs": 2}
OBJECTIVES = {
    "off-policy": {"divergence": "forward_kl"},
    "one-scalar": {"match": "samples"},
    "reverse": {"divergence": "reverse_kl"},
    "forward": {"divergence": "forward_kl"},
    "short": {"divergence": "reverse_kl"},
    "fresh": {"divergence": "reverse_kl"},
}
NUM_ROUNDS = {"fresh": 4}


def prompt_slice(out: Path, name: str, first: int, count: int) -> Path:
    """A file of some of the prompts."""
    file = out / f"{name}.jsonl"
    lines = (TOOLS / "prompts/train.jsonl").read_text().splitlines(keepends=True)
    publish(file, "".join(lines[first : first + count]).encode())
    return file


def teacher_cache_of(out: Path, name: str, first: int, count: int) -> None:
    """Traces of the teacher on some of the prompts: written in batches, then scored as text."""
    written, cache = out / f"{name}-written.jsonl", out / f"{name}-cache"
    if (cache / "catalog.parquet").exists():
        return
    roll_out(
        RolloutConfig(
            model=TEACHER, prompts=prompt_slice(out, name, first, count), out=written,
            max_new_tokens=MAX_NEW_TOKENS, batch_size=128,
        )
    )  # fmt: skip
    names = ("id", "messages", "response")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    plain = [{name: row[name] for name in names} for row in rows if row["finish_reason"] == "stop"]
    publish(out / f"{name}-traces.jsonl", "".join(f"{json.dumps(r)}\n" for r in plain).encode())
    score(
        ScoreConfig(
            traces=out / f"{name}-traces.jsonl", model=TEACHER, out=str(cache),
            engine="transformers", capture_prompt=False,
        )
    )  # fmt: skip


def trained(
    folder: Path,
    cache: str,
    student: str,
    seed: int,
    **options: Any,  # noqa: ANN401  # of TrainConfig
) -> tuple[str, dict[str, Any]]:
    """A student after a run, and the run's last metrics."""
    config = TrainConfig(
        cache=(cache,), student=student, out=folder, seed=seed, batch_traces=BATCH,
        tracker="none", save_every=10_000, **options,
    )  # fmt: skip
    result = train(config)
    return str(result.model), result.metrics


def own_cache(
    folder: Path,
    student: str,
    seed: int,
    number: int,
    **options: Any,  # noqa: ANN401  # of RolloutConfig
) -> tuple[str, float, float]:
    """A student's own traces, scored by the teacher, with the seconds of both."""
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.process_time()
    roll_out(
        RolloutConfig(
            model=student, round=number, seed=1000 * seed + number, batch_size=128,
            out=folder / "rollouts.jsonl", **options,
        )
    )  # fmt: skip
    rolled_s = time.process_time()
    cache = folder / "cache"
    score(
        ScoreConfig(
            traces=folder / "rollouts.jsonl", model=TEACHER, out=str(cache),
            engine="transformers", capture_prompt=False,
        )
    )  # fmt: skip
    return str(cache), rolled_s - began_s, time.process_time() - rolled_s


def run_arm(out: Path, arm: str, seed: int, warm: str) -> dict[str, Any]:
    """One arm of one seed: its line of results."""
    folder, student = out / f"seed-{seed}" / arm, warm
    num_rounds = NUM_ROUNDS.get(arm, 1)
    line: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "num_rounds": num_rounds,
        "rollout_s": 0.0,
        "score_s": 0.0,
    }
    totals = {"tokens_trained": 0, "flops": 0, "step": 0}
    for number in range(1, num_rounds + 1):
        part = folder / f"round-{number}"
        if arm == "off-policy":
            cache = str(out / "arm-cache")
        else:
            count = NUM_ARM // num_rounds
            length = SHORT_TOKENS if arm == "short" else MAX_NEW_TOKENS
            # Arms whose first student and lengths are the same share the rollout.
            shared = out / f"seed-{seed}" / "shared" if num_rounds == 1 and arm != "short" else part
            cache, rollout_s, score_s = own_cache(
                shared, student, seed, number, prompts=out / "arm.jsonl",
                skip=(number - 1) * count, limit=count, max_new_tokens=length,
            )  # fmt: skip
            line["rollout_s"] += rollout_s
            line["score_s"] += score_s
            line.setdefault("own", []).append(asdict(OwnFigures.of(open_cache(cache))))
        student, metrics = trained(part / "run", cache, student, seed, **ARM, **OBJECTIVES[arm])
        line["staleness"] = metrics.get("staleness")
        for name in totals:
            totals[name] += metrics[name]
    return line | totals | evaluated(folder, student, out / "heldout-cache")


def evaluated(folder: Path, student: str, heldout: Path) -> dict[str, Any]:
    """Accuracy, length and distance from the teacher on its own held-out traces."""
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        EvaluateConfig(
            model=student, prompts=TOOLS / "prompts/eval.jsonl", limit=NUM_EVAL,
            max_new_tokens=MAX_NEW_TOKENS, batch_size=NUM_EVAL, cache=str(heldout),
            completions=folder / "completions.jsonl",
        )
    )  # fmt: skip
    return {
        "accuracy": result.answers.accuracy,
        "mean_tokens": result.answers.mean_tokens,
        "unfinished_share": result.answers.unfinished_share,
        "heldout_kl": result.heldout["all"].kl,
    }


def main(out: Path, num_seeds: int, arms: list[str]) -> None:
    """Run every arm of every seed that has no line yet."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    lines = json.loads(file.read_text()) if file.exists() else []
    teacher_cache_of(out, "warm", 0, NUM_WARM)
    teacher_cache_of(out, "arm", NUM_WARM, NUM_ARM)
    teacher_cache_of(out, "heldout", NUM_WARM + NUM_ARM, NUM_HELDOUT)

    def note(line: dict[str, Any]) -> None:
        lines.append(line)
        publish(file, (json.dumps(lines, indent=1) + "\n").encode())
        print(line["seed"], line["arm"], f"{line['accuracy']:.3f}", flush=True)

    for seed in range(num_seeds):
        folder = out / f"seed-{seed}" / "warm"
        warm, _ = trained(folder / "run", str(out / "warm-cache"), BASE, seed, **WARM_UP)
        for arm in ("warm", *arms):
            if any((line["arm"], line["seed"]) == (arm, seed) for line in lines):
                continue
            if arm == "warm":
                scores = evaluated(folder, warm, out / "heldout-cache")
                note({"arm": arm, "seed": seed} | scores)
            else:
                note(run_arm(out, arm, seed, warm))


if __name__ == "__main__":
    chosen = sys.argv[3].split(",") if len(sys.argv) > 3 else list(OBJECTIVES)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3, chosen)
