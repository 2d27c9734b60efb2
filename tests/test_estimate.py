"""A trial's estimate: the line over tokens, not the ratio, and none from a handful of traces."""

import pytest
from fakes import make_header, make_traces

from teacher_cache.examine.disk_estimate import MIN_TRACES, estimate_disk
from teacher_cache.format import CacheWriter, FinishedTrace, open_cache

NUM_TRACES = 4 * MIN_TRACES


@pytest.fixture(scope="module")
def traces():
    return make_traces(NUM_TRACES)


def opened(folder, traces):
    with CacheWriter(folder, make_header()) as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    return open_cache(folder, allow_unsealed=True)


def bytes_of(cache):
    return sum(shard.size_bytes + len(shard.to_bytes()) for shard in cache.shards)


def tokens_of(cache):
    return sum(shard.num_tokens for shard in cache.shards)


def test_a_trial_foretells_a_cache_of_four_times_its_size(tmp_path, traces):
    trial = opened(tmp_path / "trial", traces[:MIN_TRACES])
    whole = opened(tmp_path / "whole", traces)
    said = estimate_disk(trial).of(tokens_of(whole))
    by_ratio = bytes_of(trial) / tokens_of(trial) * tokens_of(whole)
    assert said == pytest.approx(bytes_of(whole), rel=0.1)
    assert abs(said - bytes_of(whole)) < abs(by_ratio - bytes_of(whole)) / 2


def test_a_handful_of_traces_gives_no_estimate(tmp_path, traces):
    assert estimate_disk(opened(tmp_path / "few", traces[: MIN_TRACES - 1])) is None
