"""Prefixes of remote shards on the local disk: fetched once, bounded, never trusted unchecked."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from fakes import make_cache, make_traces

from student_train.data.stream import TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.format import CacheFormatError, PrefixCache, open_cache

TRACES = make_traces(16, lengths=(150, 250))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("remote") / "cache", TRACES)


def read(path, kept, lead_span):
    """What an epoch holds, and how many bytes came from the prefix cache's outside."""
    data = open_data([path], prefix_cache=kept)
    with TraceStream(data, TokenSelection(lead_span), batch_traces=4, num_epochs=1) as stream:
        traces = {
            item.trace.trace_id: item.trace.token_ids.tolist()
            for step in stream
            for item in step.traces
        }
    return traces, data.sources[0].cache.bytes_fetched


def num_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.prefix"))


@pytest.mark.slow
def test_what_is_here_is_not_fetched_and_a_larger_span_fetches_the_rest(path, tmp_path):
    kept = PrefixCache(tmp_path / "kept", 10**9)
    half, fetched_half = read(path, kept, 0.5)
    again, fetched_again = read(path, kept, 0.5)
    whole, fetched_rest = read(path, kept, 1.0)
    less, fetched_less = read(path, kept, 0.25)

    assert half == again == read(path, None, 0.5)[0]
    assert whole == read(path, None, 1.0)[0]
    assert less == read(path, None, 0.25)[0]
    assert fetched_again == fetched_less == 0
    assert fetched_half == read(path, None, 0.5)[1]
    assert fetched_half + fetched_rest == read(path, None, 1.0)[1] == num_bytes(kept.folder)


def test_the_folder_stays_below_its_bound_and_keeps_what_was_used_last(tmp_path):
    kept = PrefixCache(tmp_path / "kept", 250)
    fetched = []

    def fetch(offset, num_bytes):
        fetched.append((offset, num_bytes))
        return pa.py_buffer(b"x" * num_bytes)

    for key in ("aa", "bb", "aa", "cc", "aa", "bb"):  # 100 bytes each, two fit
        assert kept.read(key, 100, fetch).to_pybytes() == b"x" * 100
        assert num_bytes(kept.folder) <= 250
        time.sleep(0.002)  # times of use differ
    assert len(fetched) == 4  # aa, bb, cc, and bb again
    assert kept.read("dd", 300, fetch).size == 300  # larger than the bound: not kept
    assert sorted(file.stem for file in kept.folder.glob("*.prefix")) == ["aa", "bb"]


def test_damage_in_the_folder_is_fetched_again_and_said(path, tmp_path, caplog):
    kept = PrefixCache(tmp_path / "kept", 10**9)
    expected = read(path, kept, 1.0)
    files = sorted(kept.folder.glob("*.prefix"))
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes() + b"more than the shard has")

    found, fetched = read(path, kept, 1.0)
    assert found == expected[0]
    assert "damaged in the prefix cache" in caplog.text
    assert fetched == len(data) + files[1].stat().st_size
    assert read(path, kept, 1.0)[1] == 0


def test_damage_at_the_source_stops_and_is_not_kept(tmp_path):
    path = Path(make_cache(tmp_path / "cache", TRACES[:4]))
    shard = next((path / "shards").glob("*.arrow"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    kept = PrefixCache(tmp_path / "kept", 10**9)
    with pytest.raises(CacheFormatError, match="is damaged"):
        read(path, kept, 1.0)
    shard.write_bytes(whole)
    assert len(read(path, kept, 1.0)[0]) == 4


def test_a_full_disk_costs_only_the_keeping(path, tmp_path, caplog, monkeypatch):
    kept = PrefixCache(tmp_path / "kept", 10**9)

    def full(file, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert read(path, kept, 0.5)[0] == read(path, None, 0.5)[0]
    assert "No space left" in caplog.text
    assert list(kept.folder.glob("*.prefix")) + list(kept.folder.glob(".tmp-*")) == []


@pytest.mark.slow
def test_processes_that_want_the_same_fetch_it_once(path, tmp_path):
    kept = tmp_path / "kept"
    script = f"""
import json, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_prefix_cache import PrefixCache, Path, read
print(json.dumps(read({path!r}, PrefixCache(Path({str(kept)!r}), 10**9), 0.5)))
"""
    with ThreadPoolExecutor(3) as pool:
        outputs = list(
            pool.map(lambda _: subprocess.check_output([sys.executable, "-c", script]), range(3))
        )
    found = [json.loads(output) for output in outputs]
    traces, whole = read(path, None, 0.5)
    assert all(item[0] == traces for item in found)
    assert sum(item[1] for item in found) == whole


@pytest.mark.slow
def test_a_kill_while_writing_leaves_a_folder_that_works(path, tmp_path):
    kept = PrefixCache(tmp_path / "kept", 10**9)
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_prefix_cache import PrefixCache, Path, read
Path.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
read({path!r}, PrefixCache(Path({str(kept.folder)!r}), 10**9), 0.5)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(kept.folder.glob(".tmp-*"))
    assert read(path, kept, 0.5)[0] == read(path, None, 0.5)[0]
    assert not list(kept.folder.glob(".tmp-*"))


def test_a_cache_reads_through_it_with_every_check(path, tmp_path):
    cache = open_cache(path, prefix_cache=PrefixCache(tmp_path / "kept", 10**9))
    cache.read(0, {0: 1})
    assert cache.bytes_read == cache.bytes_fetched == cache.shards[0].prefix_bytes(1)
    cache.read(0, {0: 1})
    assert cache.bytes_read == 2 * cache.bytes_fetched


def test_a_bound_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1 byte"):
        PrefixCache(tmp_path, 0)
