"""audit: stored against live distributions, by arithmetic that is checked entry by entry."""

import json
from dataclasses import replace

import numpy as np
import pytest
from captures import VOCAB_SIZE, TableTeacher, row_over
from click.testing import CliRunner

from teacher_cache.capture.generate import generate
from teacher_cache.cli.group import cli
from teacher_cache.engines import TeacherRows
from teacher_cache.examine import audit as audit_module
from teacher_cache.examine.audit import AuditConfig, audit, lengths_within, sample_traces
from teacher_cache.examine.fidelity import LiveRows, cut_loss, divergence, logprobs_at, tails
from teacher_cache.format import CacheError, CacheMismatchError, open_cache
from teacher_cache.transform.truncate import truncate_cache


class WideTable(TableTeacher):
    """The table with every id of its vocabulary in each row, as far as `width` allows."""

    width = VOCAB_SIZE
    moved_by = 0  # 1: each row is that of the token after
    sharpness = 1.0

    def rows(self, request):
        plain = super().rows(request)
        tokens, first = plain.token_ids, plain.first_row
        ids, logprobs = [], []
        for t in range(first, len(tokens)):
            row = row_over(int(tokens[min(t - 1 + self.moved_by, len(tokens) - 1)]))
            row = row * self.sharpness - np.logaddexp.reduce(row * self.sharpness)
            ids.append([tokens[t], *np.argsort(-row)[: self.width]])
            logprobs.append(row[ids[-1]])
        return TeacherRows(
            plain.request_id, tokens, plain.num_given, first,
            np.array(ids, np.int32), np.array(logprobs, np.float32), plain.finish_reason,
        )  # fmt: skip


@pytest.fixture
def captured(capture_config, asked):
    """A cache of the table, and how to audit it."""
    generate(replace(capture_config, capture_prompt=True, mass=0.9))
    return AuditConfig(cache=str(capture_config.out), model=capture_config.model)


@pytest.fixture
def live(monkeypatch):
    """Engines that were started; `live.teacher` makes them."""

    class Live(list):
        teacher = WideTable

    started = Live()

    def start(engine, **settings):
        started.append((engine, settings))
        return started.teacher([])

    monkeypatch.setattr(audit_module, "start_teacher", start)
    return started


def test_a_cache_of_this_teacher_passes_at_the_error_of_its_grid(captured, live):
    found = audit(captured)
    assert found.passed
    assert 0 < found.kl.mean < found.kl.p99 <= found.kl.max < 1e-3
    assert found.noise.max < 1e-12
    assert found.times_the_floor == pytest.approx(1, abs=0.01)  # all of it is the grid's
    assert found.top1_agreement == 1
    assert found.nll_stored == pytest.approx(found.nll_live, abs=0.02)
    assert found.num_traces == 6
    assert found.num_tokens == sum(
        int((trace.k > 0).sum()) for trace in sample_traces(open_cache(captured.cache), 6, 0)
    )
    assert min(found.kl_if_moved.values()) > 100 * found.kl.mean
    ((_, settings),) = live
    assert settings["top_k"] == VOCAB_SIZE


def test_another_distribution_fails(captured, live):
    live.teacher = lambda asked: teacher_with(asked, sharpness=1.2)
    found = audit(captured)
    assert not found.passed
    assert found.times_the_floor > 100
    assert found.top1_agreement == 1  # of which this alone would say nothing


def teacher_with(asked, **attributes):
    teacher = WideTable(asked)
    vars(teacher).update(attributes)
    return teacher


@pytest.mark.parametrize(("moved_by", "said"), [(1, "before"), (-1, "after")])
def test_rows_that_are_off_by_one_are_called_so(captured, live, moved_by, said):
    live.teacher = lambda asked: teacher_with(asked, moved_by=moved_by)
    with pytest.raises(CacheMismatchError, match=f"belong to the token {said} each.*off by one"):
        audit(captured)


def test_an_engine_with_narrow_rows_says_what_it_could_not_see(captured, live, monkeypatch):
    whole = audit(captured)
    assert (whole.live_width, whole.num_outside) == (VOCAB_SIZE, 0)
    for width, any_outside in ((20, False), (6, True)):
        monkeypatch.setattr(audit_module, "LIVE_WIDTH", width)
        live.teacher = lambda asked, width=width: teacher_with(asked, width=width)
        narrow = audit(captured)
        assert narrow.live_width == width
        assert (narrow.num_outside > 0) == any_outside
        assert narrow.cut_by_top_k < whole.cut_by_top_k


def test_only_the_teacher_may_audit_its_cache(captured, live, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (other / file).write_bytes((tmp_path.__class__(captured.model) / file).read_bytes())
    changed = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 3}
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CacheMismatchError, match="has other weights"):
        audit(replace(captured, model=str(other)))
    assert not live
    assert audit(replace(captured, model=str(other), any_model=True)).passed


def test_a_cap_on_tokens_cuts_the_sample_there(captured, live):
    whole = audit(captured)
    capped = audit(replace(captured, max_tokens=30))
    assert 1 <= capped.num_traces < whole.num_traces
    assert capped.num_tokens < 30 < whole.num_tokens
    assert capped.passed
    assert audit(replace(captured, max_tokens=10**6)).num_tokens == whole.num_tokens


def test_a_trace_that_is_cut_in_its_prompt_is_left_out():
    from fakes import make_trace

    traces = [make_trace(name, 10, without_entries=range(1, 6)) for name in "abc"]
    assert lengths_within(traces, None) == dict.fromkeys("abc", 10)
    assert lengths_within(traces, 29) == {"a": 10, "b": 10, "c": 9}
    assert lengths_within(traces, 25) == {"a": 10, "b": 10}
    with pytest.raises(CacheError, match="Give --max-tokens more"):
        lengths_within(traces, 5)


def test_a_sample_is_drawn_by_its_seed(captured):
    cache = open_cache(captured.cache)

    def names(seed):
        return [trace.trace_id for trace in sample_traces(cache, 3, seed)]

    assert names(1) == names(1)
    assert len({tuple(names(seed)) for seed in range(8)}) > 1


def test_truncated_and_unsealed_caches_are_audited(captured, live, tmp_path, capture_config, asked):
    truncate_cache(open_cache(captured.cache), tmp_path / "half", lead_span=0.5)
    half = audit(replace(captured, cache=str(tmp_path / "half")))
    assert half.passed
    assert half.num_tokens < audit(captured).num_tokens
    generate(replace(capture_config, out=tmp_path / "open", limit=2))
    found = replace(captured, cache=str(tmp_path / "open"))
    with pytest.raises(CacheMismatchError, match="not complete"):
        audit(found)
    assert audit(replace(found, allow_unsealed=True)).num_traces == 2


def test_a_cache_without_distributions_has_nothing_to_audit(tmp_path):
    from fakes import make_cache, make_trace

    path = make_cache(tmp_path / "cache", [make_trace("t", 9, without_entries=range(1, 9))])
    with pytest.raises(CacheError, match="no trace with distributions among 1 drawn"):
        sample_traces(open_cache(path), 4, 0)


def test_the_command_exits_by_its_verdict(captured, live):
    call = ["audit", captured.cache, "--model", captured.model]
    passed = CliRunner().invoke(cli, call)
    assert passed.exit_code == 0, passed.output
    assert passed.stdout.splitlines()[-1].startswith("passed: mean KL")
    failed = CliRunner().invoke(cli, [*call, "--max-kl", "1e-9", "--json"])
    assert failed.exit_code == 1
    figures = json.loads(failed.stdout)
    assert not figures["passed"]
    assert figures["kl"]["mean"] > figures["max_kl"] == 1e-9


def random_rows(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num_rows, VOCAB_SIZE))
    dense = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    own = rng.integers(0, VOCAB_SIZE, num_rows)
    return dense, own


def live_rows(dense, own, width=VOCAB_SIZE):
    ids = np.concatenate([own[:, None], np.argsort(-dense, axis=1)[:, :width]], axis=1)
    logprobs = np.take_along_axis(dense, ids, axis=1)
    return LiveRows(ids.astype(np.int32), logprobs.astype(np.float32))


def test_ids_are_looked_up_in_their_own_row():
    dense, own = random_rows(300)
    rng = np.random.default_rng(1)
    k = rng.integers(0, 9, 300).astype(np.uint8)
    ids = np.concatenate([rng.permutation(VOCAB_SIZE)[:n] for n in k]).astype(np.int32)
    rows = np.repeat(np.arange(300), k)
    found, is_there = logprobs_at(live_rows(dense, own), k, ids)
    assert is_there.all()
    np.testing.assert_allclose(found, dense[rows, ids], rtol=1e-6)
    narrow = live_rows(dense, own, width=10)
    found, is_there = logprobs_at(narrow, k, ids)
    is_known = (narrow.ids[rows] == ids[:, None]).any(axis=1)
    np.testing.assert_array_equal(is_there, is_known)
    assert (found[~is_known] >= dense[rows, ids][~is_known] - 1e-6).all()  # an upper bound


def test_the_divergence_is_that_of_distributions_with_one_bucket_more():
    (p, _), (q, _) = random_rows(40, seed=2), random_rows(40, seed=3)
    k = np.full(40, 6, np.uint8)
    ids = np.argsort(-p, axis=1)[:, :6]
    kept_p, kept_q = np.take_along_axis(p, ids, 1), np.take_along_axis(q, ids, 1)
    tail_p, tail_q = (1 - np.exp(kept).sum(axis=1) for kept in (kept_p, kept_q))
    expected = (np.exp(kept_p) * (kept_p - kept_q)).sum(axis=1) + tail_p * np.log(tail_p / tail_q)
    np.testing.assert_allclose(tails(k, kept_q.ravel()), tail_q)
    found = divergence(k, kept_p.ravel(), tail_p, kept_q.ravel(), tail_q)
    np.testing.assert_allclose(found, expected)
    assert (found > 0).all()


def cut_by_hand(row, own, top_k, mass):
    """KL from a row to itself with all but the kept ids set to their mean."""
    order = np.argsort(-row)
    masses = np.cumsum(np.exp(row[order]))
    num_kept = min(top_k, int((masses < mass).sum()) + 1)
    kept = {*order[:num_kept].tolist(), int(own)}
    dropped = [token for token in range(len(row)) if token not in kept]
    share = np.exp(row[dropped]).sum() / len(dropped)
    return sum(np.exp(row[token]) * (row[token] - np.log(share)) for token in dropped)


@pytest.mark.parametrize(("top_k", "mass"), [(8, 1.0), (8, 0.9), (1, 1.0), (30, 0.99)])
def test_the_loss_by_a_cut_is_that_of_an_even_tail(top_k, mass):
    dense, own = random_rows(300, seed=4)
    found = cut_loss(live_rows(dense, own), top_k, mass, VOCAB_SIZE)
    expected = [cut_by_hand(row, token, top_k, mass) for row, token in zip(dense, own, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    narrow = cut_loss(live_rows(dense, own, width=35), top_k, mass, VOCAB_SIZE)
    assert (narrow <= found + 1e-6).all()
    assert narrow.mean() > 0.5 * found.mean()


def test_nothing_is_lost_where_everything_is_kept():
    dense, own = random_rows(20, seed=5)
    assert cut_loss(live_rows(dense, own), VOCAB_SIZE, 1.0, VOCAB_SIZE).max() < 1e-6
