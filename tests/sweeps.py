"""Folders of finished sweeps, made up."""

import numpy as np

from student_train.evaluation.completions import Completion, Sample, completion_log
from student_train.evaluation.prompts import prompts_fingerprint, read_prompts
from teacher_cache.format.checksums import publish_record, sha256_of

FACTS = {
    "cache": "cache", "cache_fingerprint": "f" * 32, "student": "models/<tiny> & co",
    "train_options": {"lr": 1e-3}, "eval_prompts": "p.jsonl", "eval_prompts_fingerprint": "0" * 64,
    "heldout_cache": None, "heldout_cache_fingerprint": None, "eval_options": {},
    "calls": [["train-student", "sweep", "--cache", "cache"]],
}  # fmt: skip


def make_sweep(out, cells, *, num_prompts=200):
    """Write a sweep's folder.

    Args:
        out: The folder.
        cells: (group, kind, seed, options, accuracy) of each.
        num_prompts: That every cell answered.
    """
    out.mkdir(parents=True, exist_ok=True)
    publish_record(out / "sweep.json", FACTS)
    for cell in cells:
        add_cell(out, *cell, num_prompts=num_prompts)
    return out


def add_cell(out, group, kind, seed, options, accuracy, *, num_prompts=200, prompts=None):
    name = group if seed is None else f"{group}_seed-{seed}"
    folder = out / "cells" / name
    folder.mkdir(parents=True)
    # Some prompts are hard for every cell, as they are in earnest.
    noise = np.random.default_rng([len(name), seed or 0]).normal(0, 0.5, num_prompts)
    difficulty = np.random.default_rng(0).normal(0, 1, num_prompts) + noise
    right = difficulty.argsort().argsort() < round(accuracy * num_prompts)
    fingerprint = prompts_fingerprint(list(read_prompts(prompts))) if prompts else "0" * 64
    settings = {"num_prompts": num_prompts, "samples_per_prompt": 1, "prompts": fingerprint}
    with completion_log(folder / "completions.jsonl", settings, force=True) as log:
        for prompt, is_right in enumerate(right.tolist()):
            answer = Completion(f"{name}: {prompt}", num_tokens=90, finished=True)
            verdict = {"right": is_right, "compared_as": "number", "closed": True}
            log.add(Sample(prompt, 0, group=None, found="7", completion=answer, **verdict))
    answers = {
        "num_prompts": num_prompts, "num_samples": 1, "num_right": int(right.sum()),
        "accuracy": float(right.mean()), "accuracy_low": 0.0, "accuracy_high": 1.0,
        "mean_tokens": 90.0, "unfinished_share": 0.25, "unclosed_share": 0.0,
    }  # fmt: skip
    heldout = {"cot": {"kl": 0.25, "nll": 1.5}, "all": {"kl": 0.125, "nll": 1.25}}
    result = {
        "cell": name, "group": group, "kind": kind, "seed": seed, "options": options,
        "commands": [f"train-student run --out {name}"],
        "evaluation": {"answers": answers, "groups": {"3": answers}, "heldout": heldout},
    }  # fmt: skip
    if options is not None:
        span = computation(options)
        result["run"] = {
            "step": 10, "epoch": 2.0, "tokens_trained": int(1000 * span), "bytes_read": 4000,
            "flops": int(1e9 * span), "peak_memory_bytes": int(1e6 * (0.2 + span)), "train_s": 2.0,
        }  # fmt: skip
        result["student_fingerprint"] = "s" * 32
    result["completions_sha256"] = sha256_of(folder / "completions.jsonl")
    publish_record(folder / "result.json", result)


def computation(options):
    """Share of a full-length run's."""
    span = options.get("lead_span", 1.0)
    return 0.5 if isinstance(span, str) or "max_steps" in options else span


def curve(accuracies, *, seeds=3, base=0.2):
    """Cells of lead spans, with the untrained student; seeds differ by a percent."""
    cells = [("base", "base", None, None, base)]
    for span, accuracy in accuracies.items():
        for seed in range(seeds):
            own = accuracy + 0.01 * (seed - (seeds - 1) / 2)
            cells.append((f"span-{span:g}", "span", seed, {"lead_span": span}, own))
    return cells


def costs(options):
    """Of a cache of 500 tokens."""
    span = computation(options)
    return {
        "num_positions": int(500 * span), "cot_share": span, "trace_share": span,
        "cache_bytes": 2000, "tokens_saved": 0, "num_captured": 500,
    }  # fmt: skip
