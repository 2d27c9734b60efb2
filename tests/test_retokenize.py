"""Distributions in another tokenizer: against slow definitions, exact ones, and themselves."""

import itertools
import math
from functools import cache
from dataclasses import replace

import numpy as np
import pytest
import retokenize_reference as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_tokenizers import STYLES, TEXTS, trained

from teacher_cache.format import KeepPolicy, Trace, keep_entries, stored_logprobs
from teacher_cache.transform.retokenize.alignment import Response, align
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.distribution import Derivation
from teacher_cache.transform.retokenize.joints import Joints
from teacher_cache.transform.retokenize.rows import keep
from teacher_cache.transform.retokenize.token_bytes import (
    UnsupportedTokenizerError,
    stand_in,
    token_bytes,
)

POLICY = KeepPolicy(top_k=24, mass=1.0)


class Pair:
    """A teacher's and a student's tokenizer, and everything made of them."""

    def __init__(self, teacher, student):
        self.teacher, self.student = ByteTokenizer(teacher, "T"), ByteTokenizer(student, "S")
        end = self.student.tokens.special_ids["<|end|>"]
        self.texts = list(self.teacher.tokens.of_id)
        self.texts[self.teacher.tokens.special_ids["<|end|>"]] = stand_in(end)
        self.student_bytes = [text or b"" for text in self.student.tokens.of_id]
        self.student_bytes[end] = stand_in(end)
        joints = Joints(self.student, self.teacher, self.texts)
        self.derivation = Derivation(joints, self.texts, self.student_bytes)
        self.toy = reference.Toy(
            student=self._tokens_of(self.student, end, stand_in(end)),
            teacher=self._tokens_of(
                self.teacher, self.teacher.tokens.special_ids["<|end|>"], stand_in(end)
            ),
            student_bytes=self.student_bytes,
            teacher_bytes=[text or b"" for text in self.texts],
            namesakes=self._namesakes(),
        )

    def _namesakes(self):
        names = self.student.tokens.names
        ids = {name: number for number, name in enumerate(names) if name}
        pairs = ((n, ids.get(name)) for n, name in enumerate(self.teacher.tokens.names))
        return {
            n: token
            for n, token in pairs
            if token is not None and self.texts[n] == self.student_bytes[token]
        }

    @staticmethod
    def _tokens_of(tokenizer, end, ending):
        def tokens(data):
            if data.endswith(ending):
                return [*tokenizer.encode_all([data.removesuffix(ending)])[0], end]
            return tokenizer.encode_all([data])[0]

        return tokens

    def response(self, trace):
        text = b"".join(self.toy.teacher_bytes[t] for t in trace.token_ids)
        ids = self.student.encode_all([text])[0]
        lengths = [len(self.student_bytes[token]) for token in ids]
        return Response(trace, 0, len(trace.token_ids), np.array(ids, np.int32), np.array(lengths), 0)

    def derive(self, traces):
        batch = align([self.response(trace) for trace in traces], self.derivation.teacher_lengths)
        return batch, self.derivation(batch)


def random_trace(pair, text, seed, *, width=12, policy=POLICY):
    """A trace of the teacher's own tokens whose rows favour tokens that begin like the text."""
    rng = np.random.default_rng(seed)
    ids = pair.teacher.encode(text)
    assume(len(ids) > 0)
    possible = np.array([n for n, token in enumerate(pair.texts) if token])
    rows, logprobs = [], []
    for token in ids:
        others = rng.choice(possible[possible != token], width, replace=False)
        logits = rng.normal(0, 2.5, width + 1)
        p = logits - np.logaddexp.reduce(np.append(logits, rng.normal(-2, 2)))
        candidates = np.concatenate([[token], others])
        best = np.argsort(-p)
        rows.append([token, *candidates[best]])
        logprobs.append([p[0], *p[best]])
    kept = keep_entries(np.array(rows, np.int32), np.array(logprobs, np.float32), policy)
    return Trace(
        trace_id=f"t{seed}", token_ids=np.array(ids, np.int32), n_total=len(ids), cot_start=0,
        answer_start=0, k=kept.k, top_ids=kept.top_ids, top_logits=kept.top_logits,
        tail_logit=kept.tail_logit,
    )  # fmt: skip


def rows_of(trace):
    """({id: probability}, tail) per token, as the reference takes them."""
    logprobs = stored_logprobs(trace.k, trace.top_logits, trace.tail_logit)
    ends = np.cumsum(trace.k, dtype=np.int64)
    return [
        (
            dict(zip(trace.top_ids[e - k : e].tolist(), np.exp(logprobs[e - k : e]), strict=True)),
            1 / (1 + math.exp(-float(tail))),
        )
        if k
        else None
        for k, e, tail in zip(trace.k, ends, trace.tail_logit, strict=True)
    ]


def masses(found, row):
    of_row = found.row == row
    summed = {}
    for token, mass in zip(found.token[of_row].tolist(), found.mass[of_row], strict=True):
        summed[token] = summed.get(token, 0.0) + mass
    return summed


@cache
def pair_of(*kinds):
    return Pair(*(trained(seed, style) for seed, style in kinds))


KINDS = st.tuples(st.integers(0, 5), st.sampled_from(STYLES))
PAIRS = st.tuples(KINDS, KINDS).map(lambda kinds: pair_of(*kinds))
SAME = KINDS.map(lambda kind: pair_of(kind, kind))


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.lists(TEXTS, min_size=1, max_size=3), st.integers(0, 2**32))
def test_distributions_are_those_of_the_slow_definition(pair, texts, seed):
    traces = [random_trace(pair, text, seed + n) for n, text in enumerate(texts)]
    traces = [t for t in traces if survives(pair, t)]
    assume(traces)
    batch, found = pair.derive(traces)
    first = 0
    for trace in traces:
        ids = pair.response(trace).student_ids.tolist()
        expected = reference.derive(pair.toy, trace.token_ids.tolist(), rows_of(trace), ids)
        for number, row in enumerate(expected, start=first):
            assert found.has_row[number] == (row is not None)
            if row is None:
                continue
            got = masses(found, number)
            assert got.keys() == row.mass.keys()
            for token, mass in row.mass.items():
                assert got[token] == pytest.approx(mass, abs=1e-9)
            assert found.tail[number] == pytest.approx(row.tail, abs=1e-9)
            assert found.path[number] == pytest.approx(row.path, abs=1e-9)
            assert sum(got.values()) + found.tail[number] == pytest.approx(1, abs=1e-9)
        first += len(ids)
    assert first == len(batch.student_ids)


def survives(pair, trace):
    text = b"".join(pair.toy.teacher_bytes[t] for t in trace.token_ids)
    return b"".join(pair.student_bytes[t] for t in pair.toy.student(text)) == text


@settings(max_examples=40, deadline=None)
@given(SAME, TEXTS, st.integers(0, 2**32), st.sampled_from([0.9, 0.99, 1.0]))
def test_the_same_tokenizer_changes_nothing(pair, text, seed, mass):
    policy = replace(POLICY, mass=mass)
    trace = random_trace(pair, text, seed, policy=policy)
    assume(survives(pair, trace))
    batch, found = pair.derive([trace])
    assert batch.student_ids.tolist() == trace.token_ids.tolist()
    rows = keep(found, batch.student_ids, policy)
    for name in ("k", "top_ids", "top_logits", "tail_logit"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(trace, name))
