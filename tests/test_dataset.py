"""The stream as a dataset of torch's, and the example that trains from it with a stock Trainer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import make_cache, make_traces
from students import make_student
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from student_train.batch.micro_batch import empty_micro_batch, valid_positions
from student_train.batch.torch_dataset import DistillationDataset
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of

EXAMPLE = Path(__file__).parent.parent / "tools" / "example_trainer.py"
SELECTION = TokenSelection(lead_span=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("dataset") / "cache", make_traces(22))


def dataset_of(path, **settings):
    settings = {"batch_traces": 4, "num_epochs": 2, "seed": 1} | settings
    return DistillationDataset(open_data([path]), SELECTION, **settings)


def test_items_are_the_batches_of_the_stream(path):
    dataset = dataset_of(path)
    items = list(DataLoader(dataset, batch_size=None))
    with TraceStream(open_data([path]), SELECTION, batch_traces=4, num_epochs=2, seed=1) as stream:
        steps = list(stream)

    assert len(items) == len(dataset) == len(steps) == 12
    for item, step in zip(items, steps, strict=True):
        valid = [
            item.trace.token_ids[valid_positions(item.trace, SELECTION)] for item in step.traces
        ]
        assert item["labels"][0] == -100
        assert sorted(item["labels"][1:].tolist()) == sorted(i for ids in valid for i in ids)
        assert item["batch"].input_ids.shape[0] == len(step.traces)
        assert (item["batch"].token_weight == 1).all()
    again = [item["labels"].tolist() for item in dataset]
    assert again == [item["labels"].tolist() for item in items]


def test_it_goes_on_from_a_cursor(path):
    whole = [item["labels"].tolist() for item in dataset_of(path)]
    rest = dataset_of(path, cursor=Cursor(1, 2))
    assert len(rest) == 4
    assert [item["labels"].tolist() for item in rest] == whole[8:]


def test_a_process_without_traces_gets_an_empty_batch(tmp_path, monkeypatch):
    path = make_cache(tmp_path / "cache", make_traces(1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    items = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        items += list(dataset_of(path, num_epochs=1))
    sizes = sorted(len(item["labels"]) for item in items)
    assert sizes[0] == 1 < sizes[1]
    (empty,) = (item["batch"] for item in items if len(item["labels"]) == 1)
    assert empty.input_ids.shape == empty_micro_batch().input_ids.shape


def test_worker_processes_are_refused(path):
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(iter(DataLoader(dataset_of(path), batch_size=None, num_workers=1)))


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def run_example(cache, student, out, *more, launcher=()):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parent.parent)}
    command = [sys.executable, *launcher, str(EXAMPLE), cache, student, str(out), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


@pytest.mark.slow
def test_the_example_trains_resumes_and_shares_its_work(path, tmp_path):
    student = make_student(tmp_path / "student")
    whole = run_example(path, student, tmp_path / "whole")
    logged = json.loads((tmp_path / "whole/checkpoint-6/trainer_state.json").read_text())
    first = logged["log_history"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(student)
    item = next(iter(dataset_of(path, seed=0)))
    loss, _ = StudentWithLoss(model, head_of(model))(item["batch"])
    assert first == pytest.approx(loss.item() / item["batch"].num_valid, rel=1e-4)

    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "rest" / "checkpoint-5")
    rest = run_example(path, student, tmp_path / "rest", "resume")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)

    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    two = run_example(path, student, tmp_path / "two", launcher=launcher)
    assert all(torch.allclose(whole[name], two[name], atol=2e-6) for name in whole)
