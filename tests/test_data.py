from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from caches import assert_same
from exchanges import queue_exchanges
from fakes import make_cache, make_header, make_traces

from student_train.data.heldout import heldout_part
from student_train.data.stream import TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import is_heldout, open_data
from teacher_cache.format import CacheMismatchError, CacheWriter, FinishedTrace, seal_cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", make_traces(60))


def trained_ids(data, **settings):
    settings = {"batch_traces": 8, "num_epochs": 1} | settings
    with TraceStream(data, TokenSelection(), **settings) as stream:
        return [item.trace.trace_id for step in stream for item in step.traces]


@pytest.mark.slow
def test_heldout_traces_are_whole_and_never_trained_on(path):
    traces = {trace.trace_id: trace for trace in make_traces(60)}
    data = open_data([path], heldout_share=0.3, top_k=2)  # which only training is narrowed by
    heldout = {trace.trace_id: trace for trace in data.heldout_traces()}

    assert 8 < len(heldout) == data.num_heldout < 30
    for name, trace in heldout.items():
        assert_same(traces[name], trace)
    for epoch in range(2):
        trained = trained_ids(data, num_epochs=epoch + 1)[-data.num_traces :]
        assert sorted(trained) == sorted(traces.keys() - heldout)


@pytest.mark.slow
def test_ranks_share_the_heldout_traces(path):
    data = open_data([path], heldout_share=0.3)
    whole = [trace.trace_id for trace in data.heldout_traces()]
    exchanges = queue_exchanges(3)

    def part(rank):
        mine = heldout_part(data, rank=rank, num_ranks=3, exchange=exchanges[rank], limit=9)
        return [trace.trace_id for trace in mine]

    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(part, range(3)))
    assert sorted(chain.from_iterable(ranks)) == sorted(whole[:9])
    assert min(len(part) for part in ranks) >= 2
    alone = heldout_part(data, rank=0, num_ranks=1, exchange=None, limit=5)
    assert [trace.trace_id for trace in alone] == whole[:5]


def test_reading_heldout_traces_does_not_count_as_training(path):
    data = open_data([path], heldout_share=0.3)
    assert list(data.heldout_traces())
    assert data.bytes_read == 0


def test_what_is_held_out_depends_on_the_id_alone():
    ids = [f"prompt-{number}" for number in range(4000)]
    small = {name for name in ids if is_heldout(name, 0.02)}

    assert 50 < len(small) < 110
    assert small < {name for name in ids if is_heldout(name, 0.1)}
    assert not any(is_heldout(name, 0.0) for name in ids)


def test_samples_of_a_prompt_stand_on_one_side(tmp_path):
    with CacheWriter(tmp_path, make_header(), config={"samples_per_prompt": 3}) as writer:
        for number, trace in enumerate(make_traces(90)):
            trace = replace(trace, trace_id=f"p{number // 3}#{number % 3}")
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    seal_cache(tmp_path)
    data = open_data([tmp_path], heldout_share=0.3)
    heldout = {trace.trace_id.partition("#")[0] for trace in data.heldout_traces()}

    assert 0 < len(heldout) < 30
    assert data.num_heldout == 3 * len(heldout)


def named_cache(folder, names, lengths):
    """A cache without a word of samples, as of traces that were scored."""
    traces = make_traces(len(names))
    with CacheWriter(folder, make_header()) as writer:
        for trace, name, num_prompt_tokens in zip(traces, names, lengths, strict=True):
            trace = replace(trace, trace_id=name, cot_start=num_prompt_tokens)
            writer.append(FinishedTrace(trace, name))
        writer.finish()
    seal_cache(folder)
    return folder


def test_samples_that_were_scored_again_stand_where_those_of_the_capture_do(tmp_path):
    names = [f"p{number // 3}#{number % 3}" for number in range(90)]
    scored = named_cache(tmp_path, names, [2 + number // 3 % 5 for number in range(90)])
    data = open_data([scored], heldout_share=0.3)
    heldout = {trace.trace_id for trace in data.heldout_traces()}

    assert heldout == {name for name in names if is_heldout(name.partition("#")[0], 0.3)}
    assert 0 < len(heldout) < 90


def test_other_ids_that_end_in_a_number_are_not_taken_for_samples(tmp_path):
    names = [f"gsm8k#{number}" for number in range(90)]
    data = open_data(
        [named_cache(tmp_path, names, [2 + number % 5 for number in range(90)])],
        heldout_share=0.3,
    )
    heldout = {trace.trace_id for trace in data.heldout_traces()}

    assert heldout == {name for name in names if is_heldout(name, 0.3)}
    assert 0 < len(heldout) < 90


@pytest.mark.parametrize(
    ("share", "message"), [(1e-6, "holds out none of 60"), (0.999999, "leaves none of 60")]
)
def test_a_share_that_splits_nothing_is_refused(path, share, message):
    with pytest.raises(ValueError, match=message):
        open_data([path], heldout_share=share)


def test_every_cache_must_hold_as_many_entries_as_asked(path):
    with pytest.raises(CacheMismatchError, match="top_k"):
        open_data([path], top_k=50)


VERDICTS = ("correct", "wrong", None)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """30 traces: verdicts in turn (the third of three has none), scores, and a nested field."""
    traces = []
    for number, trace in enumerate(make_traces(30)):
        fields = {"score": number, "the source": {"name": f"s{number % 2}"}}
        if VERDICTS[number % 3]:
            fields["verdict"] = VERDICTS[number % 3]
        traces.append(replace(trace, fields=fields))
    return make_cache(tmp_path_factory.mktemp("judged") / "cache", traces)


def numbers_of(data):
    infos = (info for source in data.sources for info in source.train_infos())
    return sorted(info.fields["score"] for info in infos)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('verdict == "correct"', lambda n: n % 3 == 0),
        ("verdict is None", lambda n: n % 3 == 2),
        ('verdict in ("correct", "wrong") and not score < 10', lambda n: n % 3 < 2 and n >= 10),
        ('fields["the source"]["name"] == "s1" or 3 <= score <= 4', lambda n: n % 2 or n in (3, 4)),
        ("-score > -5 and finish_reason == 'stop' and n_total > 0", lambda n: n < 5),
        ("score != 7 and trace_id not in ['t8']", lambda n: n not in (7, 8)),
    ],
)
def test_where_chooses_traces_by_their_fields(judged, where, expected):
    data = open_data([judged], where=where)
    wanted = [number for number in range(30) if expected(number)]

    assert numbers_of(data) == wanted
    assert data.sources[0].num_left_out == 30 - len(wanted)
    assert sorted(trained_ids(data)) == sorted(f"t{number}" for number in wanted)
    assert f"{len(wanted)} traces per epoch, {30 - len(wanted)} left out by --where" in data.summary


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ('verdct == "correct"', r"has a field 'verdct'; known fields: trace_id, .*, verdict"),
        ('fields["verdct"] == 1', "no trace has a field 'verdct'"),
        ("score > 100", "holds for none of 30 traces"),
        ("verdict < 3", "cannot be decided for trace 't0'"),
        ("score ==", "is not an expression"),
        ("score + 1 > 2", r"'score \+ 1' in .* is not understood"),
        ("__import__('os').system('true')", "not understood"),
        ("verdict.upper() == 'CORRECT'", "not understood"),
        ("(lambda: 1)()", "not understood"),
        ("[s for s in fields]", "not understood"),
        ("score == b'1'", "not understood"),
        ("fields[score] == 1", "not understood"),
    ],
)
def test_a_where_that_cannot_be_decided_is_refused(judged, where, message):
    with pytest.raises(ValueError, match=message):
        open_data([judged], where=where)


def test_held_out_are_some_of_those_that_where_leaves(judged):
    data = open_data([judged], where="score >= 10", heldout_share=0.3)
    plain = open_data([judged], heldout_share=0.3)
    heldout = {trace.trace_id for trace in data.heldout_traces()}

    assert heldout == {t.trace_id for t in plain.heldout_traces() if t.fields["score"] >= 10}
    assert len(heldout) + data.num_traces == 20


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Caches of 30 traces (a0 ...) and of 10 (b0 ...)."""
    folder = tmp_path_factory.mktemp("two")
    paths = []
    for name, count in (("a", 30), ("b", 10)):
        traces = make_traces(count, seed=count)
        named = [replace(t, trace_id=f"{name}{number}") for number, t in enumerate(traces)]
        paths.append(make_cache(folder / name, named))
    return paths


def counts_of(ids):
    return np.array([ids.count(f"a{n}") for n in range(30)]), np.array(
        [ids.count(f"b{n}") for n in range(10)]
    )


@pytest.mark.slow
def test_caches_without_weights_come_whole_and_are_mixed(two):
    ids = trained_ids(open_data(two), num_epochs=1)

    assert sorted(ids) == sorted([f"a{n}" for n in range(30)] + [f"b{n}" for n in range(10)])
    assert 1 < sum(name[0] == "b" for name in ids[:20]) < 10


@pytest.mark.slow
def test_weights_are_shares_of_an_epoch_and_no_trace_is_preferred(two):
    data = open_data(two, weights=(1, 1))
    assert data.shares_of_epoch == [20, 20]
    ids = trained_ids(data, num_epochs=3)
    assert len(ids) == 120
    for epoch in range(3):
        a, b = counts_of(ids[40 * epoch : 40 * (epoch + 1)])
        assert (a.sum(), b.sum()) == (20, 20)
        assert a.max() == 1
        assert (b == 2).all()
    assert (counts_of(ids)[0] == 2).all()  # 60 of 30 traces: each one twice in three epochs
    assert trained_ids(open_data(two, weights=(1, 1)), num_epochs=3) == ids


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_mixture_resumes_in_the_middle_with_any_number_of_ranks(two, num_ranks):
    data = open_data(two, weights=(1, 4))
    with TraceStream(data, TokenSelection(), batch_traces=8, num_epochs=2) as stream:
        whole = list(stream)
    settings = {"cursor": whole[6].cursor, "num_ranks": num_ranks, "batch_traces": 8}
    parts = []
    for rank in range(num_ranks):
        rest = TraceStream(
            open_data(two, weights=(1, 4)), TokenSelection(), num_epochs=2, rank=rank, **settings
        )
        with rest:
            parts.append(list(rest))

    for step, *ranks in zip(whole[7:], *parts, strict=True):
        together = [item.trace.trace_id for part in ranks for item in part.traces]
        assert sorted(together) == sorted(step.trace_ids)
        assert all(part.trace_ids == step.trace_ids for part in ranks)


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1,), "expected 2"), ((1, 1e-9), "gives no trace to an epoch of 40")],
)
def test_weights_that_do_not_fit_are_refused(two, weights, message):
    with pytest.raises(ValueError, match=message):
        open_data(two, weights=weights)


def test_a_cache_named_twice_is_refused(two):
    with pytest.raises(ValueError, match="named twice"):
        open_data([two[0], two[1], two[0]])


def test_a_small_share_reads_a_small_part_of_the_bytes(two):
    data = open_data(two, weights=(1, 9))
    trained_ids(data)
    cache = data.sources[0].cache
    whole = sum(shard.size_bytes for shard in cache.shards)
    assert cache.bytes_read < 0.5 * whole  # 4 of 30 traces, in shards of 4
