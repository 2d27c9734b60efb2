"""Copies of a student in several gloo processes: the same run as one process alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from fakes import make_cache, make_traces
from processes import metrics_of, run_processes
from students import make_student

from student_train.run import processes
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


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_that_machines_do_not_share_is_refused(tmp_path, monkeypatch, is_shared):
    """One of two processes looks for the file of the main one; nothing stays in the folder."""

    def by_main(accelerator, decide):
        file, _ = decide()  # as the main process does, on the same machine or on another
        if not is_shared:
            file.unlink()
        return file, "node0"

    def gathered(found):
        for file in tmp_path.iterdir():  # as the main process does now
            file.unlink()
        return [("node0", True), *found]

    monkeypatch.setattr(processes, "_SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr(processes, "decided_by_main", by_main)
    monkeypatch.setattr(processes, "gather_object", gathered)
    accelerator = SimpleNamespace(num_processes=2, is_main_process=False)
    if is_shared:
        processes._require_shared(tmp_path, accelerator)
    else:
        with pytest.raises(ValueError, match="does not see what node0 writes there"):
            processes._require_shared(tmp_path, accelerator)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_of_processes_whose_group_has_ended_is_refused(tmp_path, monkeypatch):
    ended = {
        "_cpu": True, "backend": "gloo", "device": torch.device("cpu"), "num_processes": 2,
        "distributed_type": DistributedType.MULTI_CPU, "process_index": 0,
        "local_process_index": 0, "fork_launched": False,
    }  # fmt: skip
    monkeypatch.setattr(PartialState, "_shared_state", ended)
    config = TrainConfig(cache=(tmp_path,), student="none", out=tmp_path / "run")
    with pytest.raises(ValueError, match="trained together before, and their group has ended"):
        train(config)


def test_a_machine_with_a_gpu_trains_on_its_cpu_where_accelerate_is_told_so(tmp_path, monkeypatch):
    class FormedError(Exception):
        pass

    def form(**arguments):
        raise FormedError(arguments["cpu"])

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(processes, "PartialState", form)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = TrainConfig(cache=(tmp_path,), student="none", out=tmp_path / "run")
    with pytest.raises(FormedError, match="True"):
        processes.join_processes(config, None)
