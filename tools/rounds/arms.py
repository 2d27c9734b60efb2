"""Rounds on own traces against more of the teacher's, on the tiny task: arms paired by seed.

    python tools/rounds/arms.py OUT [SEEDS [ARMS]]

Every seed has its own student, warmed up on the teacher's traces. From there each arm trains for as
many FLOPs; what differs is who wrote the traces and what is learned from them. In one process, one
stage after the other; run again to continue. OUT/results.json has a line per arm and seed. SEEDS
are a number, or numbers with commas between them. `tune.py` has chosen the rates of off-policy,
one-scalar and reverse on another seed; the other arms have that of reverse.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from live import train_live
from materials import (
    BASE,
    MAX_NEW_TOKENS,
    TEACHER,
    TOOLS,
    num_scored,
    other_teacher_of,
    prompt_slice,
    scored,
    teacher_cache_of,
)

from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.evaluate import evaluate
from student_train.rounds.figures import OwnFigures
from student_train.rounds.rollout import roll_out
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import open_cache
from teacher_cache.format.files import publish

NUM_WARM, NUM_ARM, NUM_HELDOUT, NUM_EVAL = 384, 256, 48, 150
EPOCHS, BATCH, SHORT_TOKENS = 2, 16, 48
WARM_UP = {"lr": 1e-3, "schedule": "linear", "warmup": 0.05}


@dataclass(frozen=True)
class Arm:
    """One way to go on from a warmed-up student."""

    name: str
    lr: float = 1e-4
    loss: dict[str, Any] = field(default_factory=lambda: {"divergence": "reverse_kl"})
    wrote: str = "student"  # or teacher, or both
    temperature: float = 1.0  # of the student's traces
    num_rounds: int = 1  # which share the prompts
    max_new_tokens: int = MAX_NEW_TOKENS
    num_prompts: int = NUM_ARM
    is_live: bool = False  # the teacher in memory, fresh traces at every step
    has_other: bool = False  # another teacher in the last round

    @property
    def options(self) -> dict[str, Any]:
        """Of every training; own tokens have no cross entropy, and the teacher's here none."""
        rate = {"lr": self.lr, "schedule": "linear", "warmup": 0.1}
        return {**rate, "ce_weight": 0.0, "epochs": EPOCHS, **self.loss}


ARMS = (
    Arm("off-policy", lr=2.5e-4, wrote="teacher", loss={"divergence": "forward_kl"}),
    Arm("one-scalar", lr=1.5e-4, loss={"match": "samples"}),
    Arm("reverse"),
    Arm("reverse-slower", lr=5e-5),  # two more answers of 150 than reverse when both were tuned
    Arm("forward", loss={"divergence": "forward_kl"}),
    Arm("both", wrote="both"),
    Arm("live", is_live=True),
    Arm("two-rounds", num_rounds=2),
    Arm("other-teacher", num_rounds=2, has_other=True),
    # As many FLOPs: the beginnings of twice as many traces.
    Arm("short", max_new_tokens=SHORT_TOKENS, num_prompts=2 * NUM_ARM),
)


def trained(
    folder: Path,
    caches: tuple[str, ...],
    student: str,
    seed: int,
    **options: Any,  # noqa: ANN401  # of TrainConfig
) -> tuple[str, dict[str, Any]]:
    """A student after a run, and the run's last metrics."""
    config = TrainConfig(
        cache=caches, student=student, out=folder, seed=seed, batch_traces=BATCH,
        tracker="none", save_every=10_000, **options,
    )  # fmt: skip
    result = train(config)
    return str(result.model), result.metrics


def own_cache(folder: Path, student: str, teacher: str, config: RolloutConfig) -> dict[str, Any]:
    """A student's own traces, scored by a teacher: the cache, its figures and the seconds of both.

    Made once: arms that begin alike share it.
    """
    file = folder / "own.json"
    if not file.exists():
        began_s = time.process_time()
        roll_out(config)
        rolled_s = time.process_time()
        cache = scored(config.out, teacher, folder / "cache")
        seconds = {"rollout": rolled_s - began_s, "score": time.process_time() - rolled_s}
        figures = asdict(OwnFigures.of(open_cache(cache)))
        found = {"cache": cache, "figures": figures, "seconds": seconds}
        publish(file, (json.dumps(found) + "\n").encode())
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def run_arm(out: Path, arm: Arm, seed: int, warm: str) -> dict[str, Any]:
    """One arm of one seed: its line of results."""
    folder, student, began_s = out / f"seed-{seed}" / arm.name, warm, time.process_time()
    line: dict[str, Any] = {"arm": arm.name, "seed": seed, "teacher_tokens": 0, "own_kl": []}
    totals = {"tokens_trained": 0, "flops": 0, "step": 0}
    if arm.is_live:
        student, metrics = train_live(
            warm, TEACHER, out / "own.jsonl", folder / "model", seed=seed, options=arm.options,
            num_prompts=arm.num_prompts, num_steps=EPOCHS * arm.num_prompts // BATCH,
            batch_traces=BATCH,
            max_new_tokens=arm.max_new_tokens,
        )  # fmt: skip
        line |= metrics
    for number in range(1, 0 if arm.is_live else arm.num_rounds + 1):
        part, caches = folder / f"round-{number}", ()
        if arm.wrote != "student":
            caches = (str(out / "arm-cache"),)
        if arm.wrote != "teacher":
            caches += (own_traces(out, arm, seed, number, student, line),)
        line["teacher_tokens"] += sum(map(num_scored, caches))
        options = arm.options
        if arm.wrote == "both":
            options["epochs"] //= 2
        student, metrics = trained(
            part / "run", caches, student, seed, **options, other_teacher=arm.has_other
        )
        line["staleness"] = metrics.get("staleness")
        for name in totals:
            totals[name] += metrics[name]
        line |= totals
    line["cpu_s"] = time.process_time() - began_s
    return line | evaluated(folder, student, out / "heldout-cache")


def own_traces(
    out: Path, arm: Arm, seed: int, number: int, student: str, line: dict[str, Any]
) -> str:
    """The cache of a round, whose figures are noted; first rounds that begin alike share it."""
    count = arm.num_prompts // arm.num_rounds
    name = f"t{arm.temperature}-n{count}-l{arm.max_new_tokens}"
    is_first = number == 1
    where = out / f"seed-{seed}" / (f"own/{name}" if is_first else f"{arm.name}/round-{number}")
    where.mkdir(parents=True, exist_ok=True)
    is_other = arm.has_other and number == arm.num_rounds
    teacher = other_teacher_of(out) if is_other else TEACHER
    found = own_cache(
        where,
        student,
        teacher,
        RolloutConfig(
            model=student, round=number, seed=1000 * seed + number, batch_size=128,
            out=where / "rollouts.jsonl", prompts=out / "own.jsonl", skip=(number - 1) * count,
            limit=count, max_new_tokens=arm.max_new_tokens, temperature=arm.temperature,
        ),
    )  # fmt: skip
    line["own_kl"].append(found["figures"]["kl"])
    return str(found["cache"])


def evaluated(folder: Path, student: str, heldout: Path) -> dict[str, Any]:
    """Accuracy, length and distance from the teacher on its own held-out traces."""
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        EvaluateConfig(
            model=student, prompts=TOOLS / "prompts/eval.jsonl", limit=NUM_EVAL,
            max_new_tokens=MAX_NEW_TOKENS, batch_size=50, cache=str(heldout),
            completions=folder / "completions.jsonl",
        )
    )  # fmt: skip
    return {
        "accuracy": result.answers.accuracy,
        "mean_tokens": result.answers.mean_tokens,
        "unfinished_share": result.answers.unfinished_share,
        "heldout_kl": result.heldout["all"].kl,
    }


def run_all(out: Path, seeds: list[int], arms: list[Arm]) -> list[dict[str, Any]]:
    """Run every arm of every seed that has no line yet; returns all lines."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    lines: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    teacher_cache_of(out, "warm", 0, NUM_WARM)
    teacher_cache_of(out, "arm", NUM_WARM, NUM_ARM)
    teacher_cache_of(out, "heldout", NUM_WARM + 2 * NUM_ARM, NUM_HELDOUT)
    prompt_slice(out, "own", NUM_WARM, 2 * NUM_ARM)

    def note(line: dict[str, Any]) -> None:
        lines.append(line)
        publish(file, (json.dumps(lines, indent=1) + "\n").encode())
        print(line["seed"], line["arm"], f"{line['accuracy']:.3f}", flush=True)

    for seed in seeds:
        folder = out / f"seed-{seed}" / "warm"
        warm, _ = trained(folder / "run", (str(out / "warm-cache"),), BASE, seed, **WARM_UP)
        done = {line["arm"] for line in lines if line["seed"] == seed}
        if "warm" not in done:
            note({"arm": "warm", "seed": seed} | evaluated(folder, warm, out / "heldout-cache"))
        for arm in arms:
            if arm.name not in done:
                note(run_arm(out, arm, seed, warm))
    return lines


def main(out: Path, seeds: str = "5", names: str = "") -> None:
    """Run the arms that are named, or all."""
    numbers = [int(each) for each in seeds.split(",")]
    chosen = [arm for arm in ARMS if not names or arm.name in names.split(",")]
    run_all(out, numbers if "," in seeds else list(range(numbers[0])), chosen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
