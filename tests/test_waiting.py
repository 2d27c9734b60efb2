"""Traces that wait for their turn: in memory up to a bound, then on the disk, and unchanged."""

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from caches import assert_same
from exchanges import queue_exchanges
from fakes import make_cache, make_header, make_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.draw import draw_spans
from student_train.data.due import DueTraces, most_waiting
from student_train.data.exchange import packed, packed_bytes
from student_train.data.order import MIN_WINDOW_SHARDS, data_order
from student_train.data.room import DiskNeed
from student_train.data.spill import SLOT_BYTES, SpillFile
from student_train.data.stream import TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.data.waiting import WaitingTraces
from teacher_cache.format import CacheWriter, FinishedTrace, seal_cache

HALF = TokenSelection(lead_span=0.5)


@pytest.fixture(scope="module")
def traces():
    return make_traces(12, lengths=(1, 60))


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory, traces):
    return make_cache(tmp_path_factory.mktemp("waiting") / "cache", make_traces(23))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "cache"
    with CacheWriter(folder, make_header(), shard_bytes=1) as writer:  # a trace fills a shard
        for trace in make_traces(110, lengths=(1, 12)):
            writer.append(FinishedTrace(trace, trace.trace_id))
        writer.finish()
    seal_cache(folder)
    return str(folder)


def steps_of(path, **settings):
    settings = {"batch_traces": 4, "num_epochs": 2, "seed": 1} | settings
    with TraceStream(open_data([path]), HALF, **settings) as stream:
        return list(stream)


sizes = st.sampled_from([0, 1, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, 3 * SLOT_BYTES])


@settings(max_examples=40)
@given(st.lists(st.one_of(sizes, st.none()), max_size=20), st.integers(0, 9))
def test_a_spill_file_gives_back_what_was_put_and_uses_its_room_again(puts, which):
    """Numbers put that many bytes, None takes some string that is there."""
    file, there, most_slots = SpillFile(), [], 0
    for number, size in enumerate(puts):
        if size is not None:
            data = bytes([number]) * size
            there.append((file.put(data), data))
        elif there:
            spilled, data = there.pop(which % len(there))
            assert file.take(spilled) == data, number
        most_slots = max(most_slots, sum(len(spilled.slots) for spilled, _ in there))
    assert file.num_bytes == most_slots * SLOT_BYTES
    for spilled, data in there:
        assert file.take(spilled) == data
    file.close()


@pytest.mark.parametrize("memory_bytes", [0, 3000, 1 << 20])
def test_traces_are_the_same_after_waiting_wherever_they_wait(traces, memory_bytes):
    waiting = WaitingTraces(memory_bytes)
    waiting.add(dict(enumerate(traces[:7])))
    waiting.add({place: traces[place] for place in range(7, 12)})
    assert waiting.memory_bytes <= memory_bytes
    assert (waiting.disk_bytes > 0) == (memory_bytes < 1 << 20)
    for place, trace in enumerate(traces):
        assert_same(waiting.take(place, trace), trace)
    assert waiting.memory_bytes == 0
    waiting.close()


def test_what_is_due_first_waits_in_memory(traces):
    waiting = WaitingTraces(sum(packed_bytes(trace) for trace in traces[:3]))
    waiting.add(dict(enumerate(traces)))
    written = waiting.disk_bytes
    for place in range(3):
        waiting.take(place, traces[place])
    assert waiting.memory_bytes == 0
    assert waiting.disk_bytes == written > 0
    waiting.close()


def test_packed_bytes_are_those_of_packed(traces):
    assert [packed_bytes(trace) for trace in traces] == [len(packed([trace])) for trace in traces]


@pytest.mark.parametrize("memory_bytes", [0, 5000])
def test_a_stream_is_the_same_wherever_its_traces_wait(cache_path, memory_bytes):
    whole, spilled = (steps_of(cache_path, memory_bytes=most) for most in (1 << 29, memory_bytes))
    assert len(whole) == len(spilled)
    for left, right in zip(whole, spilled, strict=True):
        assert (left.cursor, left.trace_ids) == (right.cursor, right.trace_ids)
        assert left.bytes_read == right.bytes_read
        for one, other in zip(left.traces, right.traces, strict=True):
            assert_same(one.trace, other.trace)
            assert one.selection == other.selection


@pytest.mark.slow
def test_bytes_are_read_once_however_widely_shards_are_mixed(many_shards):
    cache = open_data([many_shards]).sources[0].cache
    assert len(cache.shards) > 2 * MIN_WINDOW_SHARDS
    narrow, wide = (steps_of(many_shards, num_epochs=1, shuffle_window=w)[-1] for w in (0.01, 1.0))
    assert narrow.trace_ids != wide.trace_ids
    assert (
        narrow.bytes_read
        == wide.bytes_read
        <= sum(shard.prefix_bytes(20) for shard in cache.shards)
    )


def test_a_full_disk_is_said_in_one_line_and_the_other_ranks_are_told(cache_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    exchange, other = queue_exchanges(2)
    other._queues[1][0].put(DiskNeed.here(0, 0).packed())
    with pytest.raises(OSError, match=r"no room for .*TMPDIR.*--shuffle-window") as error:
        steps_of(cache_path, memory_bytes=0, num_ranks=2, exchange=exchange)
    assert error.value.errno == errno.ENOSPC
    other.swap([np.zeros(0, np.uint8)] * 2)  # what the first one needs
    with pytest.raises(ConnectionError):
        other.swap([np.zeros(0, np.uint8)] * 2)


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(cache_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    data = open_data([cache_path])
    with (
        pytest.raises(OSError, match="no room for"),
        TraceStream(data, HALF, batch_traces=4, num_epochs=1, memory_bytes=0) as stream,
    ):
        next(iter(stream))
    assert data.bytes_read == 0
    assert steps_of(cache_path)  # with memory enough no disk is needed


@pytest.mark.parametrize("free", ["for one", "for both"])
def test_room_is_counted_for_all_who_share_a_disk(cache_path, monkeypatch, free):
    """And a rank with a disk of its own is told that the others cannot go on."""
    data = open_data([cache_path])
    drawn = [draw_spans(data.sources[0], HALF, 0)]
    order = data_order(data, seed=0, epoch=0)
    places = np.arange(len(order))
    own = DueTraces(data, drawn, order, places, memory_bytes=0).disk_need()
    assert own.most_bytes > own.least_bytes > 0
    num_free = int(own.least_bytes * {"for one": 1.5, "for both": 2.1}[free])
    needs = [replace(own, free_bytes=seen) for seen in (num_free // 2, num_free)]  # in this order
    needs.append(replace(own, disk="another machine's", free_bytes=1 << 60))
    packed_needs = [DiskNeed.unpacked(need.packed()) for need in needs]
    assert packed_needs == needs
    needs[2].require_room(needs)
    for need in needs[:2]:
        if free == "for both":
            need.require_room(needs)
        else:
            with pytest.raises(OSError, match=r"no room for .* of 2 processes"):
                need.require_room(needs)


def test_a_temporary_file_that_changed_is_noticed(traces):
    waiting = WaitingTraces(0)
    waiting.add({0: traces[0]})
    os.pwrite(waiting._spill._file.fileno(), b"\0\1\2\3", 8)
    with pytest.raises(OSError, match="other bytes than were written"):
        waiting.take(0, traces[0])
    waiting.close()


@given(st.lists(st.integers(0, 6), max_size=40), st.data())
def test_most_waiting_is_what_a_count_gives(shards, data):
    amount = data.draw(st.lists(st.integers(0, 9), min_size=len(shards), max_size=len(shards)))
    found, waiting, seen = 0, 0, set()
    for shard, taken in zip(shards, amount, strict=True):
        if shard not in seen:
            seen.add(shard)
            waiting += sum(n for s, n in zip(shards, amount, strict=True) if s == shard)
        waiting -= taken
        found = max(found, waiting)
    assert most_waiting(np.array(shards, int), np.array(amount, float)) == found
