"""Training from an object store that fails now and then, and from one that goes away."""

import pytest
import torch
from caches import write_through
from fakes import make_traces
from s3_server import SECRET, s3_server
from students import make_student
from transformers import AutoModelForCausalLM

from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import seal_cache
from teacher_cache.format import store as store_module
from teacher_cache.format.store import Store

pytestmark = pytest.mark.slow

NUM_STEPS = 6


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """(proxy, URI of a cache, a configuration of a run on a local copy of it, its weights)."""
    folder = tmp_path_factory.mktemp("remote")
    student = make_student(folder / "student")
    with s3_server() as (proxy, uri):
        for place, journal in ((uri("cache"), "j1"), (folder / "cache", "j2")):
            write_through(place, make_traces(24), folder / journal)
            seal_cache(place, journal=folder / journal)
        config = TrainConfig(
            cache=(str(folder / "cache"),), student=student, out=folder / "local", batch_traces=4,
            lead_span=0.5, lr=3e-3, save_every=2,
        )  # fmt: skip
        train(config)
        yield proxy, uri("cache"), config


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(store_module, "RETRY_WAITS_S", (0.01,) * 7)


def with_changes(config, **changes):
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return TrainConfig(**values | changes)


def assert_same_student(one, other):
    left, right = (
        AutoModelForCausalLM.from_pretrained(config.out / "model").state_dict()
        for config in (one, other)
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_run_from_a_failing_store_gives_the_student_of_a_local_one(
    remote, tmp_path, quick_retries
):
    proxy, uri, local = remote
    kept = tmp_path / "kept"
    config = with_changes(
        local, cache=(uri,), out=tmp_path / "run", prefix_cache=kept, prefix_cache_bytes=10**7
    )
    before = dict(proxy.num_faults)
    proxy.fault_share = 0.15
    try:
        result = train(config)
    finally:
        proxy.fault_share = 0.0
    assert result.num_steps == NUM_STEPS
    assert SECRET not in (config.out / "config.json").read_text()
    assert sum(proxy.num_faults.values()) > sum(before.values())
    assert_same_student(local, config)
    assert list(kept.glob("*.prefix"))


def test_a_store_that_goes_away_stops_the_run_and_the_next_goes_on(
    remote, tmp_path, quick_retries, monkeypatch
):
    _, uri, local = remote
    config = with_changes(local, cache=(uri,), out=tmp_path / "run", epochs=4)
    whole = with_changes(config, out=tmp_path / "whole")
    train(whole)
    reads = []
    original = Store._path

    def path(store, name):  # Arrow itself would try for some seconds, so this is put before it
        reads.extend([name] if name.endswith(".arrow") else [])
        if len(reads) > 20:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
        return original(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_path", path)
        with pytest.raises(ConnectionError, match=r"w0-.*gave up after 8 tries: AWS Error"):
            train(config)
    assert list((config.out / "checkpoints").glob("step-*"))
    train(config)
    assert_same_student(whole, config)
