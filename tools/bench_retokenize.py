"""Student tokens per second of `cache-teacher retokenize`, on one core.

    python tools/bench_retokenize.py --teacher FOLDER --student FOLDER --text FILE

The text (every string of a JSONL file) is cut into traces in the teacher's tokens; each token's
entries are drawn from the tokens that follow its predecessor anywhere in the text, which are as
varied as real entries. Figures: the distributions alone once everything has been seen, the same
from a cold start, and with tokenising, rows and certificates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.format import KeepPolicy, Trace
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.transform.retokenize.alignment import Response, align
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.certificate import certify
from teacher_cache.transform.retokenize.distribution import Derivation
from teacher_cache.transform.retokenize.joints import Joints
from teacher_cache.transform.retokenize.rows import keep

sys.path.insert(0, str(Path(__file__).parent))
from bench_json import write_figures

POLICY = KeepPolicy(64, 0.999)
CHUNK_TRACES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder with a tokenizer")
    parser.add_argument("--student", required=True, help="likewise")
    parser.add_argument("--text", type=Path, required=True, help="JSONL")
    parser.add_argument("--entries", type=int, default=15, help="mean entries per token")
    parser.add_argument("--limit", type=int, default=4000, help="traces")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    teacher, student = (
        ByteTokenizer(TeacherTokenizer(ModelFiles(f, None), {}).definition, f)
        for f in (arguments.teacher, arguments.student)
    )
    traces = list(
        make_traces(teacher, texts_of(arguments.text, arguments.limit), arguments.entries)
    )
    figures = measure(teacher, student, traces)
    for name, value in figures.items():
        print(f"{name:28} {value:,.3f}")
    write_figures(arguments.json, figures)


def texts_of(file: Path, limit: int) -> list[str]:
    texts: list[str] = []
    with file.open() as lines:
        for line in lines:
            texts.append("\n".join(strings_in(json.loads(line))))
            if len(texts) == limit:
                break
    return texts


def strings_in(value: Any) -> Iterator[str]:  # noqa: ANN401 (any JSON)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def make_traces(teacher: ByteTokenizer, texts: list[str], num_entries: int) -> Iterator[Trace]:
    """Traces with entries that follow the previous token somewhere, padded with frequent ones."""
    tokens = [teacher.encode(text) for text in texts]
    follows: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for ids in tokens:
        for before, token in itertools.pairwise(ids):
            follows[before][token] += 1
    frequent = [t for t, _ in Counter(t for ids in tokens for t in ids).most_common(400)]
    candidates = {b: [t for t, _ in c.most_common(60)] for b, c in follows.items()}
    rng = np.random.default_rng(0)
    for number, ids in enumerate(tokens):
        kept, logits = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        k = np.zeros(len(ids), np.uint8)
        sizes = np.clip(rng.geometric(1 / num_entries, len(ids)), 1, 64)
        for t in range(1, len(ids)):
            own = candidates[ids[t - 1]][: sizes[t]]
            more = rng.choice(frequent, sizes[t]).tolist() if len(own) < sizes[t] else []
            row = list(dict.fromkeys([ids[t], *own, *more]))[: sizes[t]]
            k[t] = len(row)
            kept.append(np.array(row, np.int32))
            logits.append(-np.sort(rng.exponential(3.0, len(row)).astype(np.float32)))
            logits[-1] -= logits[-1][0]
        yield Trace(
            trace_id=str(number), token_ids=np.array(ids, np.int32), n_total=len(ids), cot_start=0,
            answer_start=0, k=k, top_ids=np.concatenate(kept), top_logits=np.concatenate(logits),
            tail_logit=np.where(k > 0, np.float32(-6.9), 0).astype(np.float32),
        )  # fmt: skip


def measure(
    teacher: ByteTokenizer, student: ByteTokenizer, traces: list[Trace]
) -> dict[str, float]:
    begin = time.process_time()
    texts = list(teacher.tokens.of_id)
    of_id = [text or b"" for text in student.tokens.of_id]
    derive = Derivation(Joints(student, teacher, texts), texts, of_id)
    start_s = time.process_time() - begin
    seconds = {"cold": 0.0, "warm": 0.0}
    parts_s = {"tokenising": 0.0, "aligning": 0.0, "deriving": 0.0, "keeping": 0.0}
    num_student = num_entries = num_last = last_s = 0.0
    chunks = [traces[n : n + CHUNK_TRACES] for n in range(0, len(traces), CHUNK_TRACES)]
    for which in seconds:
        for number, chunk in enumerate(chunks):
            times = [time.process_time()]
            responses = [respond(trace, texts, of_id, student) for trace in chunk]
            times.append(time.process_time())
            batch = align(responses, derive.teacher_lengths)
            times.append(time.process_time())
            found = derive(batch)
            times.append(time.process_time())
            rows = keep(found, batch.student_ids, POLICY)
            certify(batch, found, rows.realised, len(responses))
            times.append(time.process_time())
            seconds[which] += times[-1] - times[0]
            if which == "cold":
                num_student += len(batch.student_ids)
                num_entries += len(batch.entry_ids)
                if number >= len(chunks) * 3 // 4:
                    num_last += len(batch.student_ids)
                    last_s += times[-1] - times[0]
            else:
                for name, a, b in zip(parts_s, times, times[1:], strict=False):
                    parts_s[name] += b - a
    return {
        "start_s": start_s,
        "student_tokens": num_student,
        "entries_per_student_token": num_entries / num_student,
        "cold_tokens_per_s": num_student / seconds["cold"],
        "last_quarter_tokens_per_s": num_last / last_s,
        "warm_tokens_per_s": num_student / seconds["warm"],
        **{f"warm_us_per_token/{n}": 1e6 * s / num_student for n, s in parts_s.items()},
    }


def respond(
    trace: Trace, texts: list[bytes | None], of_id: list[bytes], student: ByteTokenizer
) -> Response:
    text = b"".join(texts[token] or b"" for token in trace.token_ids.tolist())
    ids = student.encode(text.decode())
    lengths = np.array([len(of_id[token]) for token in ids], np.int64)
    return Response(trace, 0, len(trace.token_ids), np.array(ids, np.int32), lengths, 0)


if __name__ == "__main__":
    main()
