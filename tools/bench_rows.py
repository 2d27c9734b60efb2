"""vLLM's rows of logprobs against float32 `transformers`, with and without a float32 head.

    python tools/bench_rows.py --json bench_rows.json

vLLM generates from the prompts and scores its own output; `transformers` scores the same tokens on
the CPU, in float32 and over the whole vocabulary. `largest` and `mean` are of the absolute
difference of the logprobs of all entries, in nats; `kl` is from the reference to vLLM's row, over
its entries and one bucket for the rest. `on_grid` is the share of differences between entries that
are multiples of 1/64: near 1 it reveals logits that were rounded to half precision.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from bench_json import write_figures
from numpy.typing import NDArray

from teacher_cache.engines import Sampling, TeacherRequest, TeacherRows
from teacher_cache.engines.transformers import TransformersTeacher
from teacher_cache.engines.vllm import VllmTeacher

TOOLS = Path(__file__).parent


def make_requests(model: str, prompts: Path, num_prompts: int) -> list[TeacherRequest]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    requests = []
    for number, line in enumerate(prompts.read_text().splitlines()[:num_prompts]):
        text = tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=True, tokenize=False
        )
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        requests.append(TeacherRequest(f"p{number}", ids, 200, number, capture_prompt=False))
    return requests


def scoring(rows: Iterable[TeacherRows]) -> list[TeacherRequest]:
    return [
        TeacherRequest(each.request_id, tuple(each.token_ids.tolist()), 0, 0, capture_prompt=True)
        for each in rows
    ]


class Reference:
    """`transformers` in float32: whole rows, by trace."""

    def __init__(self, model: str) -> None:
        vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        self._teacher = TransformersTeacher(model=model, dtype="float32", top_k=vocab, device="cpu")
        self._vocab = vocab

    def rows(self, traces: Iterable[TeacherRows]) -> dict[str, NDArray[np.float64]]:
        """[n - 1, V] logprobs of tokens 1 to n."""
        found = {}
        for rows in self._teacher.run(scoring(traces)):
            whole = np.empty((len(rows.row_ids), self._vocab))
            np.put_along_axis(
                whole, rows.row_ids[:, 1:].astype(np.int64), rows.row_logprobs[:, 1:], axis=1
            )
            found[rows.request_id] = whole
        return found


def compare(
    traces: Iterable[TeacherRows], reference: dict[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Distance of the rows from the reference's."""
    differences, divergences, grid = [], [], []
    for rows in traces:
        whole = reference[rows.request_id][rows.first_row - 1 :]
        ids = rows.row_ids[:, 1:].astype(np.int64)
        log_q = rows.row_logprobs[:, 1:].astype(np.float64)
        log_p = np.take_along_axis(whole, ids, axis=1)
        differences.append(np.abs(log_q - log_p).ravel())
        p, q = np.exp(log_p), np.exp(log_q)
        tail_p, tail_q = (np.maximum(1 - each.sum(axis=1), 1e-7) for each in (p, q))
        divergences.append((p * (log_p - log_q)).sum(axis=1) + tail_p * np.log(tail_p / tail_q))
        steps = (log_q - log_q[:, :1])[:, 1:8] * 64
        grid.append((np.abs(steps - np.round(steps)) < 1e-2).ravel())
    difference, on_grid = np.concatenate(differences), np.concatenate(grid)
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "kl": float(np.concatenate(divergences).mean()),
        "on_grid": float(on_grid.mean()),
        "num_rows": sum(map(len, divergences)),
    }


def measure(
    arguments: argparse.Namespace, dtype: str, head: str, reference: Reference
) -> dict[str, Any]:
    """One engine: generated rows and scored rows."""
    requests = make_requests(arguments.model, arguments.prompts, arguments.num_prompts)
    teacher = VllmTeacher(
        model=arguments.model,
        dtype=dtype,
        top_k=arguments.top_k,
        sampling=Sampling(1.0, 1.0, 0),
        engine_args={
            "hf_overrides": {"head_dtype": head},
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "max_num_seqs": 64,
        },
    )
    try:
        generated = list(teacher.run(requests))
        truth = reference.rows(generated)
        scored = list(teacher.run(scoring(generated)))
    finally:
        teacher.close()
    return {
        "dtype": teacher.facts.dtype,
        "head_dtype": teacher.facts.head_dtype,
        "engine": teacher.facts.engine_version,
        "generated": compare(generated, truth),
        "scored": compare(scored, truth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TOOLS / "tiny-teacher"))
    parser.add_argument("--prompts", type=Path, default=TOOLS / "prompts" / "eval.jsonl")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["bfloat16/float32", "bfloat16/bfloat16"],
        help="dtype of body / of head, an engine each",
    )
    parser.add_argument("--json", type=Path, help="written anew after each engine")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    reference, engines = Reference(arguments.model), []
    print(f"{'body/head':20}{'rows':12}{'largest':>10}{'mean':>10}{'KL':>10}{'on grid':>9}")
    for engine in arguments.engines:
        dtype, _, head = engine.partition("/")
        result = measure(arguments, dtype, head, reference)
        engines.append({"name": engine, **result})
        for kind in ("generated", "scored"):
            row = result[kind]
            print(
                f"{engine:20}{kind:12}{row['largest']:>10.1e}{row['mean']:>10.1e}"
                f"{row['kl']:>10.1e}{row['on_grid']:>9.2f}"
            )
        write_figures(arguments.json, {"engines": engines})


if __name__ == "__main__":
    main()
