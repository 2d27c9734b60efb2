"""A cache on an object store: the same as a local one, over a server that fails now and then."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from caches import assert_same, read_all, write_through
from click.testing import CliRunner
from fakes import make_cache, make_header, make_traces
from s3_server import SECRET, s3_server

from teacher_cache.cli.group import cli
from teacher_cache.format import (
    CacheError,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    open_cache,
    open_store,
    seal_cache,
)
from teacher_cache.format import store as store_module
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.records import committed_names
from teacher_cache.format.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import soak_kills


@pytest.fixture(scope="module")
def s3():
    with s3_server() as (proxy, uri):
        yield proxy, uri


@pytest.fixture
def proxy(s3, monkeypatch):
    monkeypatch.setattr(store_module, "RETRY_WAITS_S", (0.01,) * 7)
    yield s3[0]
    s3[0].fault_share, s3[0].old_lists = 0.0, None


@pytest.fixture
def uri(s3, proxy, request):
    """A folder of the bucket for this test alone."""
    return s3[1](request.node.name.replace("[", "-").replace("]", ""))


def assert_holds(uri, traces):
    found = read_all(open_cache(uri))
    assert sorted(found) == sorted(trace.trace_id for trace in traces)
    for trace in traces:
        assert_same(trace, found[trace.trace_id])


@pytest.mark.slow
def test_a_remote_cache_holds_the_bytes_of_a_local_one(uri, tmp_path):
    traces = make_traces(12)
    for place in (uri, tmp_path / "local"):
        write_through(place, traces, tmp_path / f"journal of {str(place)[:2]}".replace("/", ""))
        seal_cache(place, journal=tmp_path / f"journal of {str(place)[:2]}".replace("/", ""))
    remote, local = open_store(uri), open_store(tmp_path / "local")
    for folder in ("", "shards"):
        assert remote.sizes(folder) == local.sizes(folder)
    for name in (*(f"shards/{file}" for file in local.sizes("shards")), "cache.json"):
        assert remote.read(name) == local.read(name)
    assert len(local.sizes("shards")) > 6
    assert remote.sizes("journal") == {}
    assert verify_cache(uri).errors == []


@pytest.mark.slow
def test_opening_takes_no_more_requests_where_there_are_more_shards(uri, proxy, tmp_path):
    traces = make_traces(12)
    write_through(uri, traces, tmp_path / "journal")
    seal_cache(uri, journal=tmp_path / "journal")
    before = proxy.num_requests
    cache = open_cache(uri)
    assert proxy.num_requests - before <= 5
    assert len(cache.shards) > 3
    assert [info.trace_id for info in cache.infos] == [trace.trace_id for trace in traces]


@pytest.mark.slow
def test_failing_requests_are_tried_again(uri, proxy, tmp_path):
    traces = make_traces(16)
    proxy.fault_share = 0.15
    before = dict(proxy.num_faults)
    write_through(uri, traces, tmp_path / "journal")
    seal_cache(uri, journal=tmp_path / "journal")
    assert_holds(uri, traces)
    assert all(proxy.num_faults[kind] > before[kind] for kind in before), proxy.num_faults


@pytest.mark.slow
def test_lists_that_lag_behind_lose_nothing(uri, proxy, tmp_path):
    traces = make_traces(8)
    write_through(uri, traces[:3], tmp_path / "journal")
    first = open_store(uri).read("shards/w0-00000.json")
    proxy.old_lists = {}  # from here on the store shows what it shows now
    with CacheWriter(uri, make_header(), journal=tmp_path / "journal") as writer:
        for trace in traces[3:]:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
        with pytest.raises(CacheMismatchError, match=r"lacks 5 traces that were written.*again"):
            seal_cache(uri, journal=tmp_path / "journal", known=writer.finished())
    # Another run, which does not see the second one's shards, writes over none of them.
    write_through(uri, traces[3:5], tmp_path / "journal")
    proxy.old_lists = None
    assert open_store(uri).read("shards/w0-00000.json") == first
    assert seal_cache(uri, journal=tmp_path / "journal").seal.num_duplicates == 2
    assert_holds(uri, traces)


@pytest.mark.slow
def test_an_outage_stops_the_capture_and_the_next_run_goes_on(uri, proxy, tmp_path, monkeypatch):
    traces = make_traces(20)
    write_through(uri, traces[:8], tmp_path / "journal", finish=False)

    def down(store, path, data):
        if path.endswith(".arrow"):
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
        put(store, path, data)

    # Arrow itself would try for some seconds each time, so the outage is put before it.
    put = Store._write
    monkeypatch.setattr(Store, "_write", down)
    with pytest.raises(OSError, match=r"shards/w0-\d+\.arrow: gave up after 8 tries"):
        write_through(uri, traces[8:], tmp_path / "journal")
    monkeypatch.undo()
    with CacheWriter(uri, make_header(), journal=tmp_path / "journal") as writer:
        done = set(writer.finished())
    assert len(done) > 8  # what was finished after the outage began is kept too
    write_through(
        uri, [trace for trace in traces if trace.trace_id not in done], tmp_path / "journal"
    )
    seal_cache(uri, journal=tmp_path / "journal")
    assert_holds(uri, traces)


@pytest.mark.slow
def test_what_cannot_get_better_is_not_tried_again(uri, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "RETRY_WAITS_S", (60.0,))
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        write_through(uri.replace("bucket/", "nowhere/"), make_traces(1), tmp_path / "journal")
    with pytest.raises(CacheError, match="no cache here"):
        open_cache(uri)


@pytest.mark.slow
def test_a_name_that_another_machine_took_is_not_written_again(uri, tmp_path):
    traces = make_traces(6)
    write_through(uri, traces[:2], tmp_path / "here", finish=False)
    write_through(uri, traces[2:4], tmp_path / "there")
    taken = open_store(uri).read("shards/w0-00000.json")
    write_through(uri, traces[4:], tmp_path / "here")
    assert open_store(uri).read("shards/w0-00000.json") == taken
    assert len(committed_names(open_store(uri))) >= 3
    seal_cache(uri, journal=tmp_path / "here")
    assert_holds(uri, traces)


@pytest.mark.slow
def test_nobody_seals_without_a_journal_on_another_machine(uri, tmp_path):
    write_through(uri, make_traces(3), tmp_path / "there", worker="a", finish=False)
    with pytest.raises(CacheMismatchError, match=r"'a' has not finished.*/there.*a\.open"):
        seal_cache(uri, journal=tmp_path / "here")
    seal_cache(uri, journal=tmp_path / "there")
    assert_holds(uri, make_traces(3))


def test_a_journal_folder_belongs_to_one_cache(uri, tmp_path):
    write_through(uri, make_traces(2), tmp_path / "journal", finish=False)
    with pytest.raises(CacheMismatchError, match="a folder of its own"):
        write_through(tmp_path / "other", make_traces(2), tmp_path / "journal")


@pytest.mark.slow
def test_the_journal_is_under_the_users_cache_directory(uri, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    write_through(uri, make_traces(2), None, finish=False)
    (journal,) = tmp_path.rglob("w0-00000.journal")
    assert str(journal.parent) in caplog.text
    changed = uri.replace(SECRET, "rotated")
    write_through(changed, make_traces(4)[2:], None)
    seal_cache(uri)
    assert_holds(uri, make_traces(4))


def test_credentials_stay_out_of_what_is_said_and_stored(uri, tmp_path, caplog):
    caplog.set_level("DEBUG")
    write_through(uri, make_traces(2), tmp_path / "journal", finish=False)
    with pytest.raises(CacheMismatchError) as caught:
        open_cache(uri)
    cache = open_cache(uri, allow_unsealed=True)
    with pytest.raises(CacheError) as unknown:
        open_cache(f"nosuch://me:{SECRET}@place/x")
    texts = [str(caught.value), str(unknown.value), cache.path, caplog.text]
    texts += [file.read_text() for file in tmp_path.rglob("cache.txt")]
    assert not [text for text in texts if SECRET in text]


def invoke(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_every_command_takes_a_uri(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_through(uri, make_traces(6), None, finish=False)
    sealed = invoke("seal", uri)
    assert "6 traces" in sealed
    assert SECRET not in sealed
    assert json.loads(invoke("inspect", uri, "--json"))["num_traces"] == 6
    assert "6 traces" in invoke("export", uri, tmp_path / "traces.jsonl")
    half = uri.replace("?", "-half?")
    assert "6 traces" in invoke("truncate", uri, half, "--lead-span", "0.5")
    assert open_cache(half).header.max_lead_span == 0.5
    local = make_cache(tmp_path / "local", make_traces(6))
    assert "6 traces" in invoke("truncate", local, uri.replace("?", "-copy?"))


def test_a_store_that_renames_publishes_whole_files(tmp_path):
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    store = Store("hdfs://somewhere", filesystem, "cache")
    store.make_folder("shards")
    store.publish("shards/a.arrow", b"one")
    store.publish("shards/a.arrow", b"two")
    assert store.read("shards/a.arrow") == b"two"
    assert store.sizes("shards") == {"a.arrow": 3}
    store.remove("shards/a.arrow")
    assert store.size("shards/a.arrow") is None


@pytest.mark.slow
def test_a_killed_capture_into_a_failing_store_ends_like_a_local_one(uri, proxy, tmp_path):
    items = soak_kills.Items(0, 1, num_traces=90)
    said, journal = tmp_path / "said", tmp_path / "journal"

    def start(place):
        more = ("--journal", str(journal)) if place == uri else ()
        process = soak_kills.RUNS.Process(
            target=soak_kills.work, args=(str(place), "w0", items, str(said), *more)
        )
        process.start()
        return process

    local = start(tmp_path / "local")
    local.join()
    assert local.exitcode == 0, said.read_text()
    proxy.fault_share = 0.05
    num_killed = 0
    for seconds in (0.7, 1.0, 1.3, 1.6):
        process = start(uri)
        time.sleep(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
    process = start(uri)
    process.join()
    assert process.exitcode == 0, said.read_text()
    assert num_killed >= 2
    assert sum(proxy.num_faults.values()) > 5
    expected, found = soak_kills.read_all(tmp_path / "local"), soak_kills.read_all(uri)
    assert found.keys() == expected.keys()
    assert all(soak_kills.same(found[name], expected[name]) for name in found)
    assert open_cache(uri).manifest.seal.num_duplicates == 0
