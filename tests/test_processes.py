"""Copies of a student in several gloo processes: the same run as one process alone."""

from dataclasses import replace

import pytest
from fakes import make_cache, make_traces
from processes import metrics_of, run_processes
from students import make_student

from student_train.run.config import TrainConfig
from student_train.run.loop import train


@pytest.mark.slow
def test_any_cache_works_on_any_number_of_processes(tmp_path):
    """Two shards on three processes, and held-out traces in fewer of them than processes."""
    cache = make_cache(tmp_path / "cache", make_traces(24), traces_per_shard=12)
    whole = TrainConfig(
        cache=(cache,), student=make_student(tmp_path / "student"), out=tmp_path / "whole",
        lr=3e-3, batch_traces=5, batch_tokens=100, heldout_share=0.3, eval_every=2, epochs=2,
    )  # fmt: skip
    train(whole)
    moved = replace(whole, out=tmp_path / "moved")
    run_processes(3, moved, stop_at=5)
    assert len(metrics_of(moved)) == 5
    train(moved)

    one, other = metrics_of(whole), metrics_of(moved)
    assert len(one) == len(other) > 6
    for left, right in zip(one, other, strict=True):
        assert left["tokens"] == right["tokens"]
        for name in ("loss", "kl", "grad_norm", "teacher_mass"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), (left["step"], name)
        assert left.get("heldout_kl", 0) == pytest.approx(right.get("heldout_kl", 0), rel=1e-5)
