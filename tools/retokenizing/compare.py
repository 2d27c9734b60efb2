"""Do derived distributions teach a student with another tokenizer better than what is simpler?

    python tools/retokenizing/compare.py CACHE OUT --teacher FOLDER --students FOLDER ... \
        [--rows ROWS] [--prompts EVAL.jsonl]

One student per seed, in turn. Every arm trains the same students on the same text in the same
order; what differs are the distributions. Held-out traces (of the response: bits per byte, share of
tokens that are the student's likeliest) and answers to prompts of the tiny task are compared arm by
arm with the first one: paired differences over seeds and traces, with intervals of 95 %. Started
again, it resumes; results are in OUT/table.md and OUT/measures/.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_train.data.traces import is_heldout
from student_train.evaluation.intervals import Mean
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import Trace, open_cache
from teacher_cache.transform.retokenize.configs import RetokenizeConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from mappings import derive, folder_of
from tiny_task import extract_answer
from train_tiny_teacher import complete

# Name: whose distributions, and options of the run. The first is what others are compared with.
ARMS = {
    "derived": ("derived", {}),
    "hard labels": ("derived", {"ce_weight": 1.0}),
    "first token": ("first token", {}),
    "equal strings": ("equal strings", {}),
    "chunks": ("derived", {"match": "chunks"}),
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    out: Path = arguments.out
    (out / "measures").mkdir(parents=True, exist_ok=True)
    soft = {name: derived_cache(arguments, name) for name in {m for m, _ in ARMS.values()}}
    for seed in range(arguments.seeds):
        for arm in ARMS:
            file = out / "measures" / f"{arm.replace(' ', '-')}-{seed}.json"
            if not file.exists():
                model = trained(arguments, arm, seed)
                file.write_text(json.dumps(measure(arguments, model)))
                print(file.stem, "done", flush=True)
        table = make_table(out / "measures", soft)
        (out / "table.md").write_text(table)
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--prompts", type=Path, help="of the tiny task")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-traces", type=int, default=16)
    parser.add_argument("--heldout-share", type=float, default=0.2)
    return parser.parse_args()


def derived_cache(arguments: argparse.Namespace, name: str) -> float:
    """Make a mapping's cache unless it is there; return its share of soft labels."""
    return derive(
        name,
        RetokenizeConfig(
            cache=arguments.cache, out=str(folder_of(arguments.out, name)),
            student=arguments.students[0], teacher=arguments.teacher, rows=arguments.rows,
        ),
    )  # fmt: skip


def trained(arguments: argparse.Namespace, arm: str, seed: int) -> Path:
    """Train an arm's student of a seed; return its folder."""
    mapping, options = ARMS[arm]
    config = TrainConfig(
        cache=(str(folder_of(arguments.out, mapping)),),
        student=arguments.students[seed % len(arguments.students)],
        out=arguments.out / "runs" / f"{arm.replace(' ', '-')}-{seed}",
        lr=arguments.lr, epochs=arguments.epochs, max_steps=arguments.max_steps,
        batch_traces=arguments.batch_traces, heldout_share=arguments.heldout_share,
        heldout_traces=1, seed=seed, save_every=10**6, keep_last=1, tracker="none", **options,
    )  # fmt: skip
    return train(config).model


@torch.inference_mode()
def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """One value per held-out trace, or per prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[float]] = {"bits per byte": [], "likeliest": []}
    for trace in heldout_traces(arguments):
        ids = torch.from_numpy(trace.token_ids.astype(np.int64))
        targets = ids[trace.cot_start :]
        logprobs = model(ids[None]).logits[0, trace.cot_start - 1 : -1].float().log_softmax(-1)
        nats = -logprobs.gather(1, targets[:, None]).sum().item()
        num_bytes = len(tokenizer.decode(targets).encode())
        found["bits per byte"].append(nats / math.log(2) / num_bytes)
        found["likeliest"].append((logprobs.argmax(1) == targets).float().mean().item())
    if arguments.prompts is not None:
        lines = arguments.prompts.read_text().splitlines()[: arguments.num_prompts]
        rows = [json.loads(line) for line in lines]
        questions = [row["messages"][0]["content"] for row in rows]
        answers = complete(model, tokenizer, questions, sample=False)
        found["answers"] = [
            float(extract_answer(text) == row["answer"])
            for text, row in zip(answers, rows, strict=True)
        ]
    return found


def heldout_traces(arguments: argparse.Namespace) -> list[Trace]:
    cache = open_cache(str(folder_of(arguments.out, "derived")))
    return sorted(
        (
            trace
            for trace in cache.read_held(cache.traces)
            if is_heldout(trace.trace_id, arguments.heldout_share)
        ),
        key=lambda trace: trace.trace_id,
    )


def make_table(folder: Path, soft: dict[str, float]) -> str:
    """One row per arm: means, and the paired difference to the first arm."""
    first, *_ = ARMS
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for arm in ARMS:
        files = sorted(folder.glob(f"{arm.replace(' ', '-')}-[0-9]*.json"))
        seeds = [json.loads(file.read_text()) for file in files]
        values[arm] = {name: np.array([seed[name] for seed in seeds]) for name in seeds[0]}
    names = list(values[first])
    num_seeds, num_traces = values[first]["bits per byte"].shape
    lines = [
        f"{num_seeds} seeds, {num_traces} held-out traces; differences are those to {first}, of "
        "95 %.",
        "",
        "| arm | soft labels | " + " | ".join(f"{name} | difference" for name in names) + " |",
        "| --- | --- |" + " --- | --- |" * len(names),
    ]
    for arm, (mapping, options) in ARMS.items():
        share = soft[mapping] if not options else 0.0
        cells = [arm, f"{share:.1%}"]
        for name in names:
            cells.append(f"{values[arm][name].mean():.4f}")
            cells.append(
                difference(values[arm][name] - values[first][name]) if arm != first else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference(values_SP: NDArray[np.float64]) -> str:
    mean = Mean.of(values_SP)
    low, high = mean.interval
    return f"{mean.value:+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()
