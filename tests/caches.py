"""Caches written and read back whole, for the tests of everything that reads or writes them."""

import numpy as np
from fakes import make_header

from teacher_cache.format import (
    CacheWriter,
    FinishedTrace,
    lead_span_length,
    open_cache,
    seal_cache,
)

ARRAYS = ("token_ids", "k", "top_ids", "top_logits", "tail_logit")


VOCAB_SIZE = 600


def write(folder, traces, **header):
    folder.mkdir(parents=True)
    with CacheWriter(folder, make_header(vocab_size=VOCAB_SIZE, **header)) as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    seal_cache(folder)
    return open_cache(str(folder))


def read_all(cache, lead_span=1.0):
    traces = {}
    for index, shard in enumerate(cache.shards):
        keep = {
            row: lead_span_length(info.n_total, lead_span) for row, info in enumerate(shard.traces)
        }
        traces |= {trace.trace_id: trace for trace in cache.read(index, keep).values()}
    return traces


def assert_same(left, right):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    for name in ("trace_id", "n_total", "cot_start", "answer_start", "finish_reason", "fields"):
        assert getattr(left, name) == getattr(right, name)


def logits_rows(seed, num_rows=50, vocab_size=300, scale=3.0):
    """Exact log-softmax rows in float64, realised tokens drawn from them, and their top-k form."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (num_rows, vocab_size))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    realised = np.array([rng.choice(vocab_size, p=np.exp(row)) for row in logprobs])
    order = np.argsort(-logprobs, axis=1)
    ids = np.concatenate([realised[:, None], order[:, :64]], axis=1).astype(np.int32)
    return logprobs, ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)


def write_through(uri, traces, journal, *, worker="w0", finish=True):
    with CacheWriter(
        uri, make_header(), worker=worker, journal=journal, shard_bytes=3000
    ) as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        if finish:
            writer.finish()
