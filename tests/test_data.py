from dataclasses import replace
from itertools import chain

import pytest
from fakes import make_cache, make_header, make_traces
from test_format import assert_same

from student_train.data import is_heldout, open_data
from student_train.selection import TokenSelection
from student_train.stream import TraceStream
from teacher_cache.format import CacheMismatchError, CacheWriter, FinishedTrace, seal_cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", make_traces(60))


def trained_ids(data, **settings):
    settings = {"batch_traces": 8, "num_epochs": 1} | settings
    with TraceStream(data, TokenSelection(), **settings) as stream:
        return [trace.trace_id for step in stream for trace in step.traces]


def test_heldout_traces_are_whole_and_never_trained_on(path):
    traces = {trace.trace_id: trace for trace in make_traces(60)}
    data = open_data([path], heldout_share=0.3)
    heldout = {trace.trace_id: trace for trace in data.heldout_traces()}

    assert 8 < len(heldout) == data.num_heldout < 30
    for name, trace in heldout.items():
        assert_same(traces[name], trace)
    for epoch in range(2):
        trained = trained_ids(data, num_epochs=epoch + 1)[-data.num_traces :]
        assert sorted(trained) == sorted(traces.keys() - heldout)


def test_ranks_share_the_heldout_traces(path):
    data = open_data([path], heldout_share=0.3)
    whole = [trace.trace_id for trace in data.heldout_traces()]
    ranks = [[t.trace_id for t in data.heldout_traces(rank=r, num_ranks=3)] for r in range(3)]

    assert sorted(chain.from_iterable(ranks)) == sorted(whole)
    assert [trace.trace_id for trace in data.heldout_traces(limit=5)] == whole[:5]


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


@pytest.mark.parametrize(
    ("share", "message"), [(1e-6, "holds out none of 60"), (0.999999, "leaves none of 60")]
)
def test_a_share_that_splits_nothing_is_refused(path, share, message):
    with pytest.raises(ValueError, match=message):
        open_data([path], heldout_share=share)


def test_every_cache_must_hold_as_many_entries_as_asked(path):
    with pytest.raises(CacheMismatchError, match="top_k"):
        open_data([path], top_k=50)
