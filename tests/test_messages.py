"""What traces were asked travels with them: through journal, shard, seal, checks and truncation."""

import pytest
from fakes import make_header, make_traces

from teacher_cache.format import (
    CacheFormatError,
    CacheWriter,
    FinishedTrace,
    TraceNotFoundError,
    open_cache,
    seal_cache,
)
from teacher_cache.format.checking.repair import repair_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.transform.truncate import truncate_cache

ASKED = {"messages": [{"role": "user", "content": "What is 2+3?\né ⟦"}], "tools": [{"name": "add"}]}
TRACES = make_traces(6)


@pytest.fixture
def cache(tmp_path):
    """Two shards; of the traces every third was asked in plain text."""
    folder = tmp_path / "cache"
    for worker, traces in (("w0", TRACES[:3]), ("w1", TRACES[3:])):
        with CacheWriter(folder, make_header(), worker=worker) as writer:
            for number, trace in enumerate(traces):
                asked = None if number == 2 else ASKED | {"chat_template_kwargs": {"n": number}}
                writer.append(FinishedTrace(trace, trace.trace_id, messages=asked))
        if worker == "w0":
            CacheWriter(folder, make_header(), worker=worker).finish()
    seal_cache(folder)  # w1's traces come through the journal of a writer that is gone
    return folder


def test_messages_are_read_by_trace_id(cache):
    opened = open_cache(str(cache))
    found = [opened.messages(trace.trace_id) for trace in TRACES]
    first, second = (ASKED | {"chat_template_kwargs": {"n": n}} for n in (0, 1))
    assert found == [first, second, None, first, second, None]
    with pytest.raises(TraceNotFoundError):
        opened.messages("nobody")
    assert verify_cache(cache).errors == []


def test_a_truncated_cache_keeps_them(cache, tmp_path):
    truncate_cache(open_cache(str(cache)), tmp_path / "half", lead_span=0.5)
    half = open_cache(str(tmp_path / "half"))
    assert half.messages(TRACES[0].trace_id) == open_cache(str(cache)).messages(TRACES[0].trace_id)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_is_noticed_and_repaired_with_the_shard(cache, damage):
    file = cache / "messages" / "w0-00000.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data) if damage == "flipped" else file.unlink()
    opened = open_cache(str(cache))
    with pytest.raises(CacheFormatError, match=r"messages/w0-00000\.arrow"):
        opened.messages(TRACES[0].trace_id)
    assert opened.messages(TRACES[3].trace_id) is not None
    found = verify_cache(cache)
    assert [finding.file for finding in found.errors] == ["messages/w0-00000.arrow"]
    repair_cache(cache, found)
    seal_cache(cache)
    assert verify_cache(cache).errors == []
    assert len(open_cache(str(cache)).traces) == 3


def test_a_cache_without_messages_has_no_file_for_them(tmp_path):
    with CacheWriter(tmp_path, make_header()) as writer:
        writer.append(FinishedTrace(TRACES[0], "a"))
        writer.finish()
    seal_cache(tmp_path)
    assert not (tmp_path / "messages").exists()
    assert open_cache(str(tmp_path)).messages(TRACES[0].trace_id) is None
