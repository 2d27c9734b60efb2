"""A second reader, written from SPEC.md alone: pyarrow, numpy and the standard library."""

import hashlib
import json
import zlib
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from fakes import make_cache, make_traces


def content_hash(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_record(folder, name, checksum):
    record = json.loads((folder / "shards" / f"{name}.json").read_text())
    found = record.pop("checksum")
    assert found == checksum == content_hash(record)
    assert record["name"] == name
    return record


def read_lead_span(folder, lead_span):
    """{trace id: (token ids, list of {id: logprob} and tail per token)} of the first tokens."""
    manifest = json.loads((folder / "cache.json").read_text())
    assert manifest["format"] == "leadspan-cache"
    assert manifest["min_reader_version"] <= 1
    assert manifest["complete"]
    header, seal = manifest["header"], manifest["seal"]
    assert seal["fingerprint"] == content_hash(seal["shards"])
    num_bands = header["num_bands"]
    held_share = Fraction(str(header.get("max_lead_span", 1.0)))
    traces = {}
    for name, checksum in seal["shards"]:
        record = read_record(folder, name, checksum)
        assert record["header_fingerprint"] == content_hash(header)
        keep, num_read = {}, 0
        for info in record["traces"]:
            n = info["n_total"]
            held = max(1, n * held_share.numerator // held_share.denominator)
            if "lead_spans" in header:
                held = info["n_held"]
            span = Fraction(str(lead_span))
            kept = max(1, n * span.numerator // span.denominator)
            keep[info["trace_id"]] = kept
            num_read = max(num_read, -(-kept * num_bands // held))
        blocks = record["blocks"][:num_read]
        with (folder / "shards" / f"{name}.arrow").open("rb") as file:
            prefix = file.read(blocks[-1]["offset"] + blocks[-1]["length"])
        for block in blocks:
            part = prefix[block["offset"] : block["offset"] + block["length"]]
            assert zlib.crc32(part) == block["crc32"]
        stream = pa.ipc.open_stream(prefix[8:])
        for _ in blocks:
            for row in stream.read_next_batch().to_pylist():
                tokens, entries = [], []
                ends = np.cumsum([0, *row["k"]])
                for t, token_id in enumerate(row["token_ids"]):
                    logits = np.array(row["top_logits"][ends[t] : ends[t + 1]], np.float64)
                    tail = 1 / (1 + np.exp(-np.float64(row["tail_logit"][t])))
                    shift = np.log1p(-tail) - np.log(np.exp(logits).sum()) if len(logits) else 0.0
                    ids = row["top_ids"][ends[t] : ends[t + 1]]
                    tokens.append(token_id)
                    entries.append((dict(zip(ids, logits + shift, strict=True)), tail))
                if row["trace_id"] in keep:
                    held = traces.setdefault(row["trace_id"], ([], []))
                    held[0].extend(tokens)
                    held[1].extend(entries)
        for trace_id, kept in keep.items():
            traces[trace_id] = tuple(part[:kept] for part in traces[trace_id])
    return traces


@pytest.mark.parametrize("lead_span", [0.05, 0.29, 0.5, 1.0])
def test_a_reader_written_from_the_specification_reads_the_same(tmp_path, lead_span):
    from test_format import read_all

    from teacher_cache.format import open_cache, stored_logprobs

    traces = [*make_traces(7), *make_traces(2, lengths=(1, 4), seed=3)]
    traces = [type(t)(**{**vars(t), "trace_id": f"t{i}"}) for i, t in enumerate(traces)]
    folder = tmp_path / "cache"
    ours = read_all(open_cache(make_cache(folder, traces)), lead_span)
    theirs = read_lead_span(folder, lead_span)
    assert sorted(ours) == sorted(theirs)
    for trace_id, trace in ours.items():
        token_ids, entries = theirs[trace_id]
        assert token_ids == trace.token_ids.tolist()
        logprobs = stored_logprobs(trace.k, trace.top_logits, trace.tail_logit)
        np.testing.assert_allclose([p for e, _ in entries for p in e.values()], logprobs, atol=1e-9)
        assert [i for e, _ in entries for i in e] == trace.top_ids.tolist()


def test_it_reads_a_truncated_cache_too(tmp_path):
    from test_format import read_all

    from teacher_cache.format import open_cache
    from teacher_cache.transform.truncate import truncate_cache

    full = open_cache(make_cache(tmp_path / "full", make_traces(5)))
    truncate_cache(full, tmp_path / "part", lead_span=0.3)
    theirs = read_lead_span(tmp_path / "part", 0.3)
    for trace_id, trace in read_all(full, 0.3).items():
        assert theirs[trace_id][0] == trace.token_ids.tolist()
        assert [i for e, _ in theirs[trace_id][1] for i in e] == trace.top_ids.tolist()
