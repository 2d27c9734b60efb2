"""What the arms of rounds share: prompts, traces of the teacher, and another teacher.

The other teacher is the first one after a little training on right traces in which every choice of
words is made for it: as able, and its distributions lie elsewhere.
"""

import json
import random
import sys
from pathlib import Path

from student_train.rounds.rollout import roll_out
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.capture.configs import ScoreConfig
from teacher_cache.capture.score import score
from teacher_cache.format import open_cache
from teacher_cache.format.files import publish

TOOLS = Path(__file__).parent.parent
sys.path.append(str(TOOLS))
import tiny_task  # noqa: E402  # beside this folder

TEACHER, BASE = str(TOOLS / "tiny-teacher"), str(TOOLS / "base-student")
MAX_NEW_TOKENS = 180
NUM_OTHER = 512


def prompt_slice(out: Path, name: str, first: int, count: int) -> Path:
    """A file of some of the prompts."""
    file = out / f"{name}.jsonl"
    lines = (TOOLS / "prompts/train.jsonl").read_text().splitlines(keepends=True)
    publish(file, "".join(lines[first : first + count]).encode())
    return file


def teacher_cache_of(out: Path, name: str, first: int, count: int) -> str:
    """Traces of the teacher on some of the prompts: written in batches, then scored as text."""
    written, cache = out / f"{name}-written.jsonl", out / f"{name}-cache"
    if (cache / "catalog.parquet").exists():
        return str(cache)
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
    return scored(out / f"{name}-traces.jsonl", TEACHER, cache)


def scored(traces: Path, teacher: str, cache: Path) -> str:
    """A cache of a teacher's distributions on some traces."""
    score(
        ScoreConfig(
            traces=traces, model=teacher, out=str(cache), engine="transformers",
            capture_prompt=False,
        )
    )  # fmt: skip
    return str(cache)


def num_scored(cache: str) -> int:
    """Tokens that a teacher read for a cache, prompts included."""
    return open_cache(cache).catalog.num_tokens


def other_teacher_of(out: Path) -> str:
    """Folder of the other teacher."""
    folder = out / "other-teacher"
    if (folder / "result.json").exists():
        return str(folder / "model")
    rng = random.Random(7)
    rows = []
    for number in range(NUM_OTHER):
        problem = tiny_task.make_problem(rng, rng.randint(3, 5))
        text = tiny_task.write_trace(problem, rng)
        for words in (tiny_task.OPENINGS, tiny_task.STEPS, tiny_task.RESULTS, tiny_task.REMAINDERS):
            for word in words[:-1]:
                text = text.replace(word, words[-1])
        messages = [{"role": "user", "content": problem.prompt}]
        rows.append({"id": str(number), "messages": messages, "response": text})
    traces = out / "other-traces.jsonl"
    publish(traces, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    cache = scored(traces, TEACHER, out / "other-cache")
    config = TrainConfig(
        cache=(cache,), student=TEACHER, out=folder, ce_weight=1.0, lr=3e-4, schedule="linear",
        epochs=2, tracker="none",
    )  # fmt: skip
    return str(train(config).model)
