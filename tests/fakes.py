"""A teacher that is a table, its traces and caches. Light: processes that are killed import it."""

from dataclasses import replace

import numpy as np

from teacher_cache.format import (
    CacheHeader,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Trace,
    keep_entries,
    seal_cache,
    tokenizer_fingerprint,
)

VOCAB_SIZE = 41
POLICY = KeepPolicy(top_k=8, mass=0.95)
TOKENS = ["<end>", "<think>", "</think>", *(str(number) for number in range(VOCAB_SIZE - 3))]
VOCABULARY = {token: token_id for token_id, token in enumerate(TOKENS)}
END_ID, OPEN_ID, CLOSE_ID = 0, 1, 2


def make_header(**changes):
    header = CacheHeader(
        mode="score", teacher="table", teacher_revision=None, teacher_fingerprint="f" * 32,
        engine="fake", engine_version="1", dtype="float32", head_dtype="float32",
        vocab_size=VOCAB_SIZE, tokenizer_size=VOCAB_SIZE,
        tokenizer_fingerprint=tokenizer_fingerprint(VOCABULARY),
        chat_template_hash="", think_open_ids=(OPEN_ID,), think_close_ids=(CLOSE_ID,),
        terminal_token_ids=(END_ID,), sampling=None, top_k=POLICY.top_k, mass=POLICY.mass,
        capture_prompt=True, num_bands=20,
    )  # fmt: skip
    return replace(header, **changes)


def make_trace(trace_id, num_tokens, *, seed=0, without_entries=()):
    """A trace whose next token depends on the one before; every entry is the table's own row."""
    table = np.random.default_rng(7).normal(0.0, 2.0, (VOCAB_SIZE, VOCAB_SIZE))
    logprobs = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
    rng = np.random.default_rng([seed, num_tokens])
    tokens = [int(rng.integers(VOCAB_SIZE))]
    while len(tokens) < num_tokens:
        tokens.append(int(rng.choice(VOCAB_SIZE, p=np.exp(logprobs[tokens[-1]]))))
    token_ids = np.array(tokens, np.int32)
    rows = logprobs[token_ids[:-1]].astype(np.float32)
    best = np.argsort(-rows, axis=1)[:, : POLICY.top_k].astype(np.int32)
    ids = np.concatenate([token_ids[1:, None], best], axis=1)
    kept = keep_entries(ids, np.take_along_axis(rows, ids, axis=1), POLICY)
    has_entries = np.ones(num_tokens, bool)
    has_entries[[0, *without_entries]] = False
    of_kept = np.repeat(has_entries[1:], kept.k)
    return Trace(
        trace_id=trace_id,
        token_ids=token_ids,
        n_total=num_tokens,
        cot_start=num_tokens // 4,
        answer_start=num_tokens * 3 // 4,
        k=np.where(has_entries, np.concatenate([[0], kept.k]), 0).astype(np.uint8),
        top_ids=kept.top_ids[of_kept],
        top_logits=kept.top_logits[of_kept],
        tail_logit=np.where(has_entries, np.concatenate([[0], kept.tail_logit]), 0).astype("f4"),
    )


def make_traces(num_traces, *, lengths=(24, 60), seed=0):
    rng = np.random.default_rng(seed)
    return [
        make_trace(f"t{number}", int(rng.integers(*lengths)), seed=seed * 1000 + number)
        for number in range(num_traces)
    ]


def make_cache(folder, traces, *, traces_per_shard=4, **header_changes):
    """Write and seal a cache; returns its path as users give it."""
    write_shards(folder, traces, traces_per_shard=traces_per_shard, **header_changes)
    if not traces:
        CacheWriter(folder, make_header(**header_changes)).finish()
    seal_cache(folder)
    return str(folder)


def write_shards(folder, traces, *, first_worker=0, traces_per_shard=4, **header_changes):
    """Write traces into a cache that is not sealed, a worker for each shard; returns its path."""
    header = make_header(**header_changes)
    for number, first in enumerate(range(0, len(traces), traces_per_shard), start=first_worker):
        writer = CacheWriter(folder, header, worker=f"w{number:03d}")
        for trace in traces[first : first + traces_per_shard]:
            writer.append(FinishedTrace(trace, source_hash=trace.trace_id))
        writer.finish()
    return str(folder)
