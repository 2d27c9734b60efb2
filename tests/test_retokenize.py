"""Distributions in another tokenizer: against slow definitions, exact ones, and themselves."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import retokenize_reference as reference
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_tokenizers import STYLES, TEXTS, trained

from teacher_cache.format import KeepPolicy, Trace, keep_entries, stored_logprobs
from teacher_cache.transform.retokenize.alignment import Response, align
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.distribution import Derivation
from teacher_cache.transform.retokenize.joints import Joints
from teacher_cache.transform.retokenize.rows import keep
from teacher_cache.transform.retokenize.token_bytes import (
    byte_of_character,
    stand_in,
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
        return Response(
            trace, 0, len(trace.token_ids), np.array(ids, np.int32), np.array(lengths), 0
        )

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


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(PAIRS, st.lists(TEXTS, min_size=1, max_size=3), st.integers(0, 2**32))
@example(pair_of((2, "gpt2"), (0, "gpt4")), ["the cat", "the catthe catthe cat sat sat7the cat"], 1)
@example(pair_of((3, "gpt2"), (2, "gpt2")), ["the cat", "the cat" * 8 + "한국👩\u200d👩"], 130)
@example(pair_of((4, "sentencepiece"), (0, "qwen")), ["the catthe catthe catWörter"], 921)
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


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(PAIRS, TEXTS, st.integers(0, 2**32))
def test_the_realised_text_keeps_its_probability(pair, text, seed):
    """The chain rule: along the text nothing is lost, whatever is in the tails."""
    trace = random_trace(pair, text, seed)
    assume(survives(pair, trace))
    batch, found = pair.derive([trace])
    assume((batch.depth == 0).all())
    assert found.has_row.all()
    assert np.log(found.path).sum() == pytest.approx(np.log(batch.realised).sum(), abs=1e-6)
    rows = keep(found, batch.student_ids, POLICY)
    assert (rows.realised >= found.path * (1 - 1e-12)).all()


def spelling(merges):
    """A tokenizer of single bytes and a few merges."""
    vocab = {character: number for number, character in enumerate(sorted(byte_of_character()))}
    parts = [tuple(part.replace(" ", "Ġ") for part in merge) for merge in merges]
    for left, right in parts:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=parts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer.to_str()


MERGES = (
    (),
    (("a", "b"),),
    (("a", "b"), ("b", "a"), ("ab", "b")),
    (("b", "a"), (" ", "a"), (" a", "b")),
    (("a", "a"), ("aa", "b"), (" ", "b"), ("b", "b")),
)


@cache
def spelling_pair(teacher, student):
    pair = Pair(spelling(MERGES[teacher]), spelling(MERGES[student]))
    pair.toy.student, pair.toy.teacher = cache(pair.toy.student), cache(pair.toy.teacher)
    return pair


class ToyTeacher:
    """A teacher over a few tokens whose next one depends on the last, and never writes two tokens
    that its tokenizer would have written in another way."""

    def __init__(self, pair, seed):
        rng = np.random.default_rng(seed)
        of_id = pair.teacher.tokens.of_id
        self.support = [n for n, t in enumerate(of_id) if t and set(t) <= set(b"ab ")]
        self.pair, self._rows = pair, {}
        self._rng = rng

    def row(self, before):
        if before not in self._rows:
            logits = self._rng.normal(0, 1.5, len(self.support))
            weights = dict(zip(self.support, np.exp(logits), strict=True))
            of_id = self.pair.toy.teacher_bytes
            if before is not None:
                weights = {
                    t: w
                    for t, w in weights.items()
                    if self.pair.toy.teacher(of_id[before] + of_id[t]) == [before, t]
                }
            total = sum(weights.values())
            self._rows[before] = {t: w / total for t, w in weights.items()}
        return self._rows[before]

    def paths(self, before, depth):
        """Every way to go on by `depth` tokens, with its probability."""
        if depth == 0:
            yield (), 1.0
            return
        for token, p in self.row(before).items():
            for rest, q in self.paths(token, depth - 1):
                yield (token, *rest), p * q


def exact(teacher, tokens, level, ids, number):
    """The student's next token, by going through all continuations, and how far the rule is off.

    Returns:
        {token: probability}, and a bound of the distance: mass of the continuations for which the
        rule names another token than the student's tokenizer does.
    """
    toy, totals, wrong, kept = teacher.pair.toy, {}, 0.0, 0.0
    begin = b"".join(toy.teacher_bytes[t] for t in tokens[:level])
    for path, p in teacher.paths(tokens[level - 1] if level else None, 4):
        written = toy.student(begin + b"".join(toy.teacher_bytes[t] for t in path))
        stands = written[:number] == ids[:number] and len(written) > number
        truth = written[number] if stands else None
        if truth is not None:
            totals[truth] = totals.get(truth, 0.0) + p
        rule = label(toy, path, tokens, level, ids, number)
        wrong += p * (rule != truth)
        kept += p * (rule is not None)
    total = sum(totals.values())
    # Both are conditional: |a/A - b/B| adds up to at most 3/2 of the mass that differs, over A.
    return {token: p / total for token, p in totals.items()}, 1.5 * wrong / kept


def label(toy, path, tokens, level, ids, number):
    """Where the rule sends the mass of one continuation; None where it leaves it out."""
    token, size = ids[number], len(toy.student_bytes[ids[number]])
    so_far = b""
    for step, entry in enumerate(path):
        is_own = level + step < len(tokens) and entry == tokens[level + step]
        text = toy.teacher_bytes[entry]
        if len(so_far) >= size:  # one look behind the token's end
            if is_own or len(so_far) > size:
                return token
            kind, found = reference.joint(toy, token, path[step - 1], entry, text)
            return found if kind == "merged" else token
        if not is_own and step == 0:
            before = ids[number - 1] if number else None
            teacher_before = tokens[level - 1] if level else None
            kind, found = reference.joint(toy, before, teacher_before, entry, text)
            return found if kind == "next" else None
        if not is_own:
            return toy.student(so_far + text)[0]
        so_far += text
    return token


def toy_trace(teacher, num_tokens, seed):
    """A trace drawn from a toy teacher, with all of its distributions."""
    rng = np.random.default_rng([seed, 1])
    tokens, rows = [], []
    for _ in range(num_tokens):
        row = teacher.row(tokens[-1] if tokens else None)
        rows.append(row)
        tokens.append(int(rng.choice(list(row), p=list(row.values()))))
    return tokens, rows


TOYS = st.integers(0, len(MERGES) - 1)


def distances(pair, seed):
    """(distance to the exact distribution, its bound) where a token begins on a boundary."""
    teacher = ToyTeacher(pair, seed)
    tokens, rows = toy_trace(teacher, 6, seed)
    ids = pair.toy.student(b"".join(pair.toy.teacher_bytes[t] for t in tokens))
    derived = reference.derive(pair.toy, tokens, [(row, 0.0) for row in rows], ids)
    starts = np.cumsum([0, *(len(pair.toy.teacher_bytes[t]) for t in tokens)]).tolist()
    place = 0
    for number, (token, row) in enumerate(zip(ids, derived, strict=True)):
        # The last tokens of a trace have no look ahead.
        if place in starts and starts.index(place) <= 2:
            truth, bound = exact(teacher, tokens, starts.index(place), ids, number)
            both = {*truth, *row.mass}
            yield sum(abs(truth.get(u, 0.0) - row.mass.get(u, 0.0)) for u in both) / 2, bound
        place += len(pair.student_bytes[token])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(TOYS, TOYS, st.integers(0, 2**32))
def test_the_distance_to_the_exact_distribution_is_bounded(teacher, student, seed):
    for distance, bound in distances(spelling_pair(teacher, student), seed):
        assert distance <= bound + 1e-9


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(TOYS, st.integers(0, 2**32))
def test_a_student_of_single_bytes_gets_the_exact_distribution(teacher, seed):
    for distance, bound in distances(spelling_pair(teacher, 0), seed):
        assert bound == pytest.approx(0, abs=1e-12)
        assert distance == pytest.approx(0, abs=1e-9)
