"""What a dying writer leaves behind, and who may write where."""

import concurrent.futures
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from caches import assert_same, read_all
from fakes import make_header, make_trace, make_traces

from teacher_cache.format import (
    CacheFormatError,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    Store,
    open_cache,
    seal_cache,
)
from teacher_cache.format.writing import writer as writer_module
from teacher_cache.format.writing.journal import Journal, read_journal


def append_all(writer, traces):
    for trace in traces:
        writer.append(FinishedTrace(trace, f"hash of {trace.trace_id}"))


def journal_files(folder):
    return sorted((folder / "journal").glob("*.journal"))


def assert_holds(folder, traces):
    found = read_all(open_cache(str(folder), allow_unsealed=True))
    assert sorted(found) == sorted(trace.trace_id for trace in traces)
    for trace in traces:
        assert_same(trace, found[trace.trace_id])


def test_a_writer_goes_on_where_the_last_one_was_closed(tmp_path):
    traces = make_traces(9)
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, traces[:4])
    with CacheWriter(tmp_path, make_header()) as writer:
        assert dict(writer.finished()) == {t.trace_id: f"hash of {t.trace_id}" for t in traces[:4]}
        append_all(writer, traces[4:])
        writer.finish()
    assert_holds(tmp_path, traces)
    assert journal_files(tmp_path) == []


@pytest.mark.parametrize("kept", ["all but one byte", "half", "one byte"])
def test_a_torn_tail_is_cut_off_and_what_came_before_is_kept(tmp_path, kept, caplog):
    traces = make_traces(5)
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, traces[:4])
        (journal,) = journal_files(tmp_path)
        whole = journal.stat().st_size
        append_all(writer, traces[4:])
    frame = journal.stat().st_size - whole
    torn = whole + {"all but one byte": frame - 1, "half": frame // 2, "one byte": 1}[kept]
    os.truncate(journal, torn)
    with CacheWriter(tmp_path, make_header()) as writer:
        assert sorted(writer.finished()) == [trace.trace_id for trace in traces[:4]]
        assert f"bytes {whole} to {torn} are torn or damaged" in caplog.text
        append_all(writer, traces[4:])
        writer.finish()
    assert_holds(tmp_path, traces)


def test_a_journal_that_died_in_its_first_frame_begins_anew(tmp_path):
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, make_traces(1))
    (journal,) = journal_files(tmp_path)
    os.truncate(journal, 3)
    with CacheWriter(tmp_path, make_header()) as writer:
        assert dict(writer.finished()) == {}
        append_all(writer, make_traces(2))
        writer.finish()
    assert_holds(tmp_path, make_traces(2))


@pytest.mark.parametrize("damage", ["a flipped bit", "a page of zeros", "a cut-out piece"])
def test_a_journal_damaged_in_the_middle_keeps_every_other_trace(tmp_path, damage, caplog):
    traces = make_traces(7)
    ends = []
    with CacheWriter(tmp_path, make_header()) as writer:
        for trace in traces:
            append_all(writer, [trace])
            (journal,) = journal_files(tmp_path)
            ends.append(journal.stat().st_size)
    data = bytearray(journal.read_bytes())
    middle = (ends[2] + ends[3]) // 2  # of the fourth trace
    if damage == "a flipped bit":
        data[middle] ^= 4
    elif damage == "a page of zeros":
        data[middle : middle + 64] = bytes(64)
    else:
        del data[middle : middle + 64]
    journal.write_bytes(data)
    with CacheWriter(tmp_path, make_header()) as writer:
        assert sorted(writer.finished()) == ["t0", "t1", "t2", "t4", "t5", "t6"]
        assert f"{journal}: bytes {ends[2]} to " in caplog.text
        append_all(writer, [traces[3]])
    with CacheWriter(tmp_path, make_header()) as writer:
        assert len(writer.finished()) == 7
        writer.finish()
    assert_holds(tmp_path, traces)


@pytest.mark.parametrize("tail", [bytes(4096), b"\x28\xb5\x2f\xfd" * 500, b"noise " * 99])
def test_what_a_power_cut_leaves_at_the_end_is_cut_off(tmp_path, tail, caplog):
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, make_traces(3))
    (journal,) = journal_files(tmp_path)
    whole = journal.stat().st_size
    with journal.open("ab") as file:
        file.write(tail)
    with CacheWriter(tmp_path, make_header()) as writer:
        assert len(writer.finished()) == 3
        assert f"bytes {whole} to {whole + len(tail)} are torn" in caplog.text
        append_all(writer, make_traces(4)[3:])
        writer.finish()
    assert_holds(tmp_path, make_traces(4))


def test_a_journal_whose_first_bytes_are_damaged_stops_the_writer_and_is_kept(tmp_path):
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, make_traces(3))
    (journal,) = journal_files(tmp_path)
    damaged = bytes(4) + journal.read_bytes()[4:]
    journal.write_bytes(damaged)
    with pytest.raises(
        CacheFormatError, match=r"w0-00000\.journal: the first .*Move the file away"
    ):
        CacheWriter(tmp_path, make_header())
    assert journal.read_bytes() == damaged


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    CacheWriter(tmp_path, make_header()).close()
    for name in (".tmp-w0-00000.arrow-1a", ".tmp-w1-00000.arrow-1b"):
        (tmp_path / "shards" / name).write_bytes(b"half")
    CacheWriter(tmp_path, make_header()).close()
    left = [file.name for file in (tmp_path / "shards").iterdir()]
    assert left == [".tmp-w1-00000.arrow-1b"]  # w1 may be writing it now
    seal_cache(tmp_path)
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("moment", ["after the shard", "after the commit record"])
def test_a_death_while_publishing_neither_loses_nor_repeats(tmp_path, monkeypatch, moment):
    traces = make_traces(6)
    publish = Store.publish

    def dying_publish(store, name, data):
        publish(store, name, data)
        if name.endswith(".arrow" if moment == "after the shard" else ".json"):
            raise KeyboardInterrupt  # stands for a kill: nothing after it runs

    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, traces)
    monkeypatch.setattr(Store, "publish", dying_publish)
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, make_header()) as writer:
        writer.finish()
    monkeypatch.undo()
    with CacheWriter(tmp_path, make_header()) as writer:
        assert len(writer.finished()) == 6
        writer.finish()
    assert_holds(tmp_path, traces)


KILLED_WRITER = """
    import sys
    from pathlib import Path
    from fakes import make_header, make_traces
    from teacher_cache.format import CacheWriter, FinishedTrace

    with CacheWriter(Path(sys.argv[1]), make_header(), shard_bytes=4000) as writer:
        for trace in make_traces(60):
            if trace.trace_id not in writer.finished():
                writer.append(FinishedTrace(trace, "source"))
                print("appended", flush=True)
        writer.finish()
"""


@pytest.mark.slow
def test_a_writer_killed_again_and_again_ends_with_every_trace_once(tmp_path):
    code = textwrap.dedent(KILLED_WRITER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    num_killed = 0
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3 + attempt % 5):
            if not process.stdout.readline():
                break
        time.sleep(0.003 * (attempt % 7))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == -signal.SIGKILL:
            num_killed += 1
        else:
            break
    assert num_killed >= 5
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert_holds(tmp_path, make_traces(60))
    seal = seal_cache(tmp_path).seal
    assert (seal.num_traces, seal.num_duplicates) == (60, 0)


def test_another_captures_folder_is_refused_and_the_difference_named(tmp_path):
    CacheWriter(tmp_path, make_header()).close()
    with pytest.raises(CacheMismatchError, match=r"top_k: 8 there, 9 now.*another folder"):
        CacheWriter(tmp_path, make_header(top_k=9))


def test_two_processes_cannot_write_as_the_same_worker(tmp_path):
    with (
        CacheWriter(tmp_path, make_header()),
        pytest.raises(CacheMismatchError, match="another process writes here as worker 'w0'"),
    ):
        CacheWriter(tmp_path, make_header())


def test_several_workers_write_one_cache_and_a_trace_captured_twice_counts_once(tmp_path):
    traces = make_traces(6)
    with (
        CacheWriter(tmp_path, make_header(), worker="a") as first,
        CacheWriter(tmp_path, make_header(), worker="b") as second,
    ):
        append_all(first, traces[:4])
        append_all(second, traces[3:])
        first.finish()
        second.finish()
    seal = seal_cache(tmp_path).seal
    assert (seal.num_traces, seal.num_duplicates) == (6, 1)
    cache = open_cache(str(tmp_path))
    ids = [cache.shards[shard].traces[row].trace_id for shard, row in cache.traces]
    assert sorted(ids) == [trace.trace_id for trace in traces]
    assert cache.shards[0].name.startswith("a-")
    assert ids.index("t3") == 3  # of the shard whose name sorts first


def test_a_seal_waits_for_every_worker_and_what_comes_later_is_not_hidden(tmp_path):
    with CacheWriter(tmp_path, make_header(), worker="a") as first:
        append_all(first, make_traces(2))
        first.finish()
    late = CacheWriter(tmp_path, make_header(), worker="b")
    with pytest.raises(CacheMismatchError, match="another process writes here as worker 'b'"):
        seal_cache(tmp_path)
    late.close()
    seal_cache(tmp_path)
    with CacheWriter(tmp_path / "other", make_header(), worker="c") as other:
        append_all(other, [make_trace("new", 30)])
        other.finish()
    for file in (tmp_path / "other" / "shards").iterdir():
        file.rename(tmp_path / "shards" / file.name)
    with pytest.raises(CacheMismatchError, match="shard c-00000 came after the seal"):
        seal_cache(tmp_path)


@pytest.mark.parametrize("worker", ["", "a-1", "n1.cluster", "a/b", "-"])
def test_a_workers_name_that_no_shard_could_have_is_refused(tmp_path, worker):
    with pytest.raises(ValueError, match="only letters, digits and _"):
        CacheWriter(tmp_path / "cache", make_header(), worker=worker)
    assert not (tmp_path / "cache").exists()


def test_sealing_takes_in_what_stopped_workers_left(tmp_path):
    traces = make_traces(4)
    with CacheWriter(tmp_path, make_header(), worker="a") as writer:
        append_all(writer, traces[:2])
    with CacheWriter(tmp_path, make_header(), worker="b") as writer:
        append_all(writer, traces[2:])
    seal_cache(tmp_path)
    assert len(open_cache(str(tmp_path)).traces) == 4
    with (
        CacheWriter(tmp_path, make_header()) as writer,
        pytest.raises(ValueError, match="sealed"),
    ):
        append_all(writer, [make_trace("new", 30)])


def test_a_short_write_stops_the_writer_and_everything_before_is_kept(tmp_path, monkeypatch):
    traces = make_traces(4)
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, traces[:2])
        real = writer._journal._file

        class FullDisk:
            def __getattr__(self, name):
                return getattr(real, name)

            def write(self, data):
                return real.write(data[: len(data) // 2])

        writer._journal._file = FullDisk()
        with pytest.raises(OSError, match="No space left") as caught:
            append_all(writer, traces[2:])
        assert caught.value.errno == errno.ENOSPC
    with CacheWriter(tmp_path, make_header()) as writer:
        assert sorted(writer.finished()) == ["t0", "t1"]
        append_all(writer, traces[2:])
        writer.finish()
    assert_holds(tmp_path, traces)


def test_an_error_of_the_compacting_thread_is_an_error_of_the_writer(tmp_path, monkeypatch):
    def failing_publish(store, name, data):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    traces = make_traces(8)
    with (
        pytest.raises(PermissionError, match="Permission denied"),
        CacheWriter(tmp_path, make_header(), shard_bytes=2000) as writer,
    ):
        monkeypatch.setattr(Store, "publish", failing_publish)
        append_all(writer, traces)
    monkeypatch.undo()
    with CacheWriter(tmp_path, make_header()) as writer:
        done = set(writer.finished())
        assert done
        append_all(writer, [trace for trace in traces if trace.trace_id not in done])
        writer.finish()
    assert_holds(tmp_path, traces)


def test_an_error_of_the_compacting_thread_stops_the_writer_at_the_next_append(
    tmp_path, monkeypatch
):
    failed = threading.Event()

    def failing_publish(store, name, data):
        failed.set()
        raise MemoryError(name)

    traces = make_traces(12)
    with (
        pytest.raises(MemoryError, match="w0-00000"),
        CacheWriter(tmp_path, make_header(), shard_bytes=2000) as writer,
    ):
        monkeypatch.setattr(Store, "publish", failing_publish)
        appended = 0
        while not failed.is_set():
            append_all(writer, [traces[appended]])
            appended += 1
            failed.wait(0.05 if writer._compaction else 0)
        concurrent.futures.wait([writer._compaction])
        append_all(writer, [traces[appended]])
    monkeypatch.undo()
    with CacheWriter(tmp_path, make_header()) as writer:
        assert len(writer.finished()) == appended + 1  # the last one too


@pytest.mark.slow
def test_a_journal_that_compresses_well_is_closed_before_it_grows_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_DECODED_BYTES", 5000)
    with CacheWriter(tmp_path, make_header()) as writer:
        append_all(writer, make_traces(20))
        writer.finish()
    shards = open_cache(tmp_path, allow_unsealed=True).shards
    assert len(shards) > 3
    assert all(sum(trace.n_total for trace in shard.traces) < 500 for shard in shards)
    assert_holds(tmp_path, make_traces(20))


def test_a_journal_of_another_capture_is_refused(tmp_path):
    journal = Journal(tmp_path / "x.journal", "one capture")
    journal.close()
    with pytest.raises(CacheFormatError, match="belongs to another capture"):
        Journal(tmp_path / "x.journal", "another")
    with pytest.raises(CacheFormatError, match="belongs to another capture"):
        list(read_journal(tmp_path / "x.journal", "another"))


def test_the_manifest_says_what_made_the_cache(tmp_path):
    with CacheWriter(tmp_path, make_header(), config={"limit": 3}) as writer:
        append_all(writer, make_traces(2))
        writer.finish()
    record = json.loads((tmp_path / "cache.json").read_text())
    assert record["complete"] is False
    assert record["config"] == {"limit": 3}
    seal_cache(tmp_path)
    record = json.loads((tmp_path / "cache.json").read_text())
    assert record["complete"] is True
    assert record["seal"]["num_traces"] == 2
