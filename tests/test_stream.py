import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import numpy as np
import pytest
from caches import assert_same
from exchanges import queue_exchanges
from fakes import make_cache, make_trace, make_traces

import student_train.data.prefetch as prefetch
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.format import CacheFormatError, open_cache

WHOLE = TokenSelection()


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("stream") / "cache", make_traces(23))


def stream_of(path, selection=WHOLE, *, data=None, **settings):
    settings = {"batch_traces": 4, "num_epochs": 2, "seed": 1} | settings
    return TraceStream(data or open_data([path]), selection, **settings)


def steps_of(path, selection=WHOLE, *, limit=None, **settings):
    with stream_of(path, selection, **settings) as stream:
        return list(islice(stream, limit))


def ids(steps):
    return [[item.trace.trace_id for item in step.traces] for step in steps]


@pytest.mark.slow
def test_an_epoch_holds_every_trace_once_and_ends_with_a_smaller_batch(cache_path):
    steps = steps_of(cache_path)

    assert [len(step.traces) for step in steps] == [4, 4, 4, 4, 4, 3] * 2
    for epoch in (steps[:6], steps[6:]):
        assert sorted(chain.from_iterable(ids(epoch))) == sorted(
            f"t{number}" for number in range(23)
        )
    assert ids(steps[:6]) != ids(steps[6:])


@pytest.mark.parametrize("step", range(13))
def test_resuming_from_any_cursor_equals_no_interruption(cache_path, step):
    whole = steps_of(cache_path)
    cursor = whole[step - 1].cursor if step else Cursor()
    rest = steps_of(cache_path, cursor=Cursor.from_json(cursor.to_json()))

    assert ids(rest) == ids(whole[step:])
    assert [item.cursor for item in rest] == [item.cursor for item in whole[step:]]


@pytest.mark.slow
def test_a_view_gives_fewer_entries_of_the_same_tokens(cache_path):
    whole, narrow = (
        steps_of(cache_path),
        steps_of(cache_path, data=open_data([cache_path], top_k=2)),
    )
    assert ids(narrow) == ids(whole)
    for left, right in zip(narrow, whole, strict=True):
        for mine, whole_one in zip(left.traces, right.traces, strict=True):
            assert mine.trace.token_ids.tolist() == whole_one.trace.token_ids.tolist()
            assert mine.trace.k.max() <= 3 < whole_one.trace.k.max()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_together_hold_the_batches_of_one(cache_path, num_ranks):
    whole = steps_of(cache_path)
    ranks = [steps_of(cache_path, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]

    for step, *parts in zip(whole, *ranks, strict=True):
        together = [item.trace.trace_id for part in parts for item in part.traces]
        assert sorted(together) == sorted(item.trace.trace_id for item in step.traces)
        assert all(part.trace_ids == step.trace_ids for part in parts)


@pytest.mark.slow
def test_resuming_with_another_number_of_ranks_goes_on_in_the_same_order(cache_path):
    whole = steps_of(cache_path)
    rest = [steps_of(cache_path, rank=r, num_ranks=2, cursor=whole[2].cursor) for r in range(2)]

    assert [step.trace_ids for step in rest[0]] == [step.trace_ids for step in whole[3:]]


def on_ranks(num_ranks, work):
    """The results of `work(rank, exchange)` in one thread per rank; the first error is raised."""
    exchanges = queue_exchanges(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(work, range(num_ranks), exchanges))


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_that_exchange_traces_read_each_shard_once(cache_path, num_ranks):
    half = TokenSelection(lead_span=0.5)
    (whole,) = on_ranks(1, lambda rank, exchange: steps_of(cache_path, half))
    ranks = on_ranks(
        num_ranks,
        lambda rank, exchange: steps_of(
            cache_path, half, rank=rank, num_ranks=num_ranks, exchange=exchange
        ),
    )
    assert sum(rank[-1].bytes_read for rank in ranks) == whole[-1].bytes_read
    for step, *parts in zip(whole, *ranks, strict=True):
        together = {item.trace.trace_id: item for part in parts for item in part.traces}
        assert len(together) == sum(len(part.traces) for part in parts) == len(step.traces)
        for item in step.traces:
            received = together[item.trace.trace_id]
            assert_same(received.trace, item.trace)
            assert (received.selection, received.source) == (item.selection, item.source)


@pytest.mark.slow
def test_ranks_with_more_shards_than_they_or_fewer_are_dealt_equally_many_tokens(tmp_path):
    """7 shards on 8 ranks, of traces as uneven as reasoning traces."""
    lengths = np.exp(np.random.default_rng(0).normal(4.0, 0.8, 128)).astype(int) + 8
    traces = [make_trace(f"t{n}", int(length), seed=n) for n, length in enumerate(lengths)]
    path = make_cache(tmp_path / "cache", traces, traces_per_shard=19)
    data = open_data([path])
    assert data.num_shards == 7
    settings = {"data": data, "num_ranks": 8, "batch_traces": 64, "num_epochs": 1}
    ranks = [steps_of(path, rank=rank, **settings) for rank in range(8)]
    tokens = np.array([[sum(len(t.trace) for t in s.traces) for s in rank] for rank in ranks])
    assert tokens.mean(axis=0).sum() / tokens.max(axis=0).sum() > 0.97


def test_a_rank_that_cannot_read_tells_the_others(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(24))
    shard = tmp_path / "cache/shards/w003-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    raised = []

    def work(rank, exchange):
        with pytest.raises((CacheFormatError, ConnectionError)) as error:
            steps_of(path, rank=rank, num_ranks=3, exchange=exchange, num_epochs=1)
        raised.append(error.value)

    on_ranks(3, work)
    reasons = [error for error in raised if isinstance(error, CacheFormatError)]
    assert len(reasons) == 1
    assert len(raised) == 3
    assert "w003-00000" in str(reasons[0])


def test_ranks_that_stop_together_leave_no_thread_waiting(cache_path):
    def work(rank, exchange):
        settings = {"rank": rank, "num_ranks": 3, "exchange": exchange, "num_epochs": 1000}
        with stream_of(cache_path, **settings) as stream:
            for number, _ in enumerate(stream):
                threading.Event().wait(0.01 * rank)  # ranks are never at the same point
                if number == 3:
                    break

    on_ranks(3, work)
    assert not stream_threads()


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """30 small shards of traces as uneven as 8 to 400 tokens."""
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(400), 60)).astype(int)
    traces = [make_trace(f"t{n}", int(length), seed=n) for n, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("many") / "cache"
    return make_cache(path, traces, traces_per_shard=2)


@pytest.mark.slow
def test_a_run_that_changes_its_number_of_ranks_sees_the_same_batches(many_shards):
    settings = {"num_epochs": 2, "batch_traces": 7}
    whole = steps_of(many_shards, **settings)
    cursor, done = Cursor(), []
    for num_ranks, num_steps in ((8, 3), (2, 4), (5, 5), (1, 2), (3, None)):
        settings |= {"num_ranks": num_ranks, "limit": num_steps, "cursor": cursor}
        ranks = [steps_of(many_shards, rank=rank, **settings) for rank in range(num_ranks)]
        for parts in zip(*ranks, strict=True):
            together = [item.trace.trace_id for part in parts for item in part.traces]
            assert sorted(together) == sorted(parts[0].trace_ids)
            done.append(parts[0].trace_ids)
        cursor = ranks[0][-1].cursor

    assert done == [step.trace_ids for step in whole]
    for epoch in (done[:9], done[9:]):
        assert sorted(chain.from_iterable(epoch)) == sorted(f"t{n}" for n in range(60))


def test_truncation_changes_neither_order_nor_what_a_step_holds(cache_path):
    whole = steps_of(cache_path)
    half = steps_of(cache_path, TokenSelection(lead_span=0.5))

    assert ids(half) == ids(whole)
    for cut, full in zip(half[0].traces, whole[0].traces, strict=True):
        length = full.trace.n_total // 2
        assert cut.trace.token_ids.tolist() == full.trace.token_ids[:length].tolist()


def test_half_a_lead_span_reads_fewer_bytes(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(8, lengths=(200, 300)))
    whole, half = (
        steps_of(path, TokenSelection(lead_span=span), num_epochs=1)[-1].bytes_read
        for span in (1.0, 0.5)
    )

    assert half < 0.6 * whole


def test_sections_before_the_answer_do_not_read_it(cache_path):
    steps = steps_of(cache_path, TokenSelection(sections=("prompt", "cot")))

    assert all(
        len(item.trace.token_ids) == item.trace.answer_start
        for step in steps
        for item in step.traces
    )


@pytest.mark.parametrize("num_traces", [1, 3])
def test_a_cache_smaller_than_a_batch_ends(tmp_path, num_traces):
    steps = steps_of(make_cache(tmp_path / "cache", make_traces(num_traces)), batch_traces=16)

    assert [len(step.traces) for step in steps] == [num_traces, num_traces]
    assert steps[-1].cursor == Cursor(2, 0)


def test_a_cache_with_fewer_traces_than_ranks_ends_on_every_rank(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(1))
    ranks = [steps_of(path, rank=rank, num_ranks=4) for rank in range(4)]

    assert sorted(len(rank[0].traces) for rank in ranks) == [0, 0, 0, 1]
    assert all(len(rank) == 2 for rank in ranks)


def test_a_damaged_shard_stops_the_consumer_by_its_name(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(8))
    shard = tmp_path / "cache/shards/w001-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    with pytest.raises(CacheFormatError, match="w001-00000"):
        steps_of(path)
    assert not stream_threads()


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "trace-stream"]


def test_leaving_a_stream_early_ends_its_thread(cache_path):
    with stream_of(cache_path, num_epochs=1000) as stream:
        next(iter(stream))
        assert stream_threads()
    assert not stream_threads()


def test_an_error_of_the_consumer_ends_the_thread(cache_path):
    with pytest.raises(KeyboardInterrupt), stream_of(cache_path, num_epochs=1000) as stream:
        for _ in stream:
            raise KeyboardInterrupt
    assert not stream_threads()


def test_steps_are_prepared_in_the_thread_and_its_errors_reach_the_consumer(cache_path):
    threads = []

    def prepare(step):
        threads.append(threading.current_thread().name)
        if step.cursor.step == 3:
            raise ValueError("cannot be prepared")
        return step.trace_ids

    with stream_of(cache_path).prefetched(prepare) as prepared:
        found = [next(prepared), next(prepared)]
        with pytest.raises(ValueError, match="cannot be prepared"):
            next(prepared)
    assert found == [step.trace_ids for step in steps_of(cache_path, limit=2)]
    assert threads == ["trace-stream"] * 3


def test_leaving_does_not_wait_for_a_store_that_does_not_answer(cache_path, monkeypatch):
    monkeypatch.setattr(prefetch, "CLOSE_S", 0.1)
    data = open_data([cache_path])
    answer = threading.Event()
    data.sources[0].cache.read = lambda *args: answer.wait(60) and {}
    with stream_of(cache_path, data=data):
        assert stream_threads()
    assert stream_threads()  # still waiting; it ends with the process
    answer.set()
    stream_threads()[0].join(10)
    assert not stream_threads()


@pytest.mark.parametrize(
    "selection",
    [
        TokenSelection(trace_tokens=3),
        TokenSelection(trace_tokens=17),
        TokenSelection(trace_tokens=1000),
        TokenSelection(sections=("prompt",)),
        TokenSelection(sections=("cot",)),
        TokenSelection(trace_tokens=30, sections=("cot", "answer")),
    ],
    ids=str,
)
def test_a_budget_or_sections_read_up_to_the_last_band_that_a_trace_needs(tmp_path, selection):
    traces = make_traces(6, lengths=(30, 90))
    cache = open_cache(make_cache(tmp_path / "cache", traces, traces_per_shard=6))
    steps = steps_of(cache.path, selection, num_epochs=1)
    (shard,) = cache.shards
    needed = 0  # a band more is needed as long as a trace's tokens go beyond those before it
    for trace in shard.traces:
        ranges = selection.ranges(trace)
        while trace.n_total * needed // 20 < (ranges[-1][1] if ranges else 1):
            needed += 1
    assert steps[-1].bytes_read == shard.prefix_bytes(needed)
    assert (needed == 20) == (selection.trace_tokens == 1000)


@pytest.mark.slow
def test_no_more_steps_than_agreed_are_read_ahead(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(40), traces_per_shard=1)
    data = open_data([path])
    cache = data.sources[0].cache
    read = []
    original = cache.read
    cache.read = lambda shard, keep, view: read.append(shard) or original(shard, keep, view)
    with TraceStream(data, WHOLE, batch_traces=1, num_epochs=1) as stream:
        steps = iter(stream)
        next(steps)
        threading.Event().wait(0.5)  # time enough for a thread that is not held back
        assert len(read) <= 8
        assert len(list(steps)) == 39


def test_a_stream_must_be_entered(cache_path):
    with pytest.raises(RuntimeError, match="with"):
        iter(stream_of(cache_path))
