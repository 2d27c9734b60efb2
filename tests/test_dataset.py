"""The stream as a dataset of torch's, and the example that trains from it with a stock Trainer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from fakes import make_cache, make_traces
from forked import run_forked
from students import make_model, make_student
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from student_train.batch import torch_dataset
from student_train.batch.loss_tokens import valid_positions
from student_train.batch.micro_batch import empty_micro_batch
from student_train.batch.torch_dataset import DistillationDataset
from student_train.batch.trace_rows import collate_traces
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of

EXAMPLE = Path(__file__).parent.parent / "tools" / "example_trainer.py"
SFT_EXAMPLE = EXAMPLE.with_name("example_sft_trainer.py")
SELECTION = TokenSelection(lead_span=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("dataset") / "cache", make_traces(22))


def dataset_of(path, **settings):
    settings = {"batch_traces": 4, "num_epochs": 2, "seed": 1} | settings
    return DistillationDataset(open_data([path]), SELECTION, **settings)


def labels_of(items):
    return [item["labels"].tolist() for item in items]


@pytest.mark.slow
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
    assert labels_of(dataset) == labels_of(items)  # an iteration begins where the one before did


def test_it_goes_on_from_a_cursor(path):
    whole = [item["labels"].tolist() for item in dataset_of(path)]
    rest = dataset_of(path, cursor=Cursor(1, 2))
    assert len(rest) == 4
    assert [item["labels"].tolist() for item in rest] == whole[8:]


def test_a_process_without_traces_gets_an_empty_batch(tmp_path, monkeypatch):
    path = make_cache(tmp_path / "cache", make_traces(1))
    monkeypatch.setattr(torch_dataset, "GlooExchange", lambda: None)
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


@pytest.mark.slow
def test_every_epoch_of_a_loop_has_its_own_order(path):
    whole = labels_of(dataset_of(path, num_epochs=3))
    loader = dataset_of(path, num_epochs=1).loader()
    assert [labels_of(loader) for _ in range(3)] == [whole[:6], whole[6:12], whole[12:]]

    dataset = dataset_of(path, num_epochs=1)
    dataset.set_epoch(2)
    assert labels_of(dataset) == whole[12:]


@pytest.mark.slow
def test_it_is_continued_from_its_state(path):
    whole = labels_of(dataset_of(path, num_epochs=3))
    dataset = dataset_of(path, num_epochs=1)
    dataset.set_epoch(1)
    items = iter(dataset)
    assert labels_of([next(items), next(items)]) == whole[6:8]
    state = json.loads(json.dumps(dataset.state_dict()))

    resumed = dataset_of(path, num_epochs=1)
    resumed.load_state_dict(state)
    assert len(resumed) == 4
    resumed.set_epoch(1)  # as trainers do
    assert labels_of(resumed) == whole[8:12]
    resumed.set_epoch(2)
    assert labels_of(resumed) == whole[12:]


@pytest.mark.slow
def test_a_loader_that_would_batch_or_divide_the_items_is_told_what_to_do(path, tmp_path):
    with pytest.raises(RuntimeError, match=r"expected batch_size=None.*dataset\.loader\(\)"):
        next(iter(DataLoader(dataset_of(path), batch_size=4)))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(make_model(), arguments, train_dataset=dataset_of(path))
    with pytest.raises(RuntimeError, match=r"as_hf_dataset\(\)"):
        trainer.train()
    for batch_size, dispatch in ((None, True), (1, False)):
        loader = prepare_data_loader(
            DataLoader(dataset_of(path), batch_size=batch_size), num_processes=2, process_index=0,
            device=torch.device("cpu"), put_on_device=True, dispatch_batches=dispatch,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=r"keep the loader out of accelerator\.prepare"):
            next(iter(loader))


def test_rows_collated_are_the_batches(path):
    dataset = dataset_of(path, num_epochs=2)
    rows = list(dataset.as_hf_dataset())
    assert len(rows) == 44
    collated = [collate_traces(rows[first : first + 4]) for first in range(0, 20, 4)]
    for mine, item in zip(collated, dataset, strict=False):
        batch, expected = mine["batch"], item["batch"]
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.hidden_index, expected.hidden_index)
        for name in ("top_ids", "top_logits", "k", "tail_logit", "target_ids"):
            assert torch.equal(getattr(batch.targets, name), getattr(expected.targets, name))
        counted = mine["labels"][..., 1:]
        assert sorted(counted[counted != -100].tolist()) == sorted(item["labels"][1:].tolist())


def test_worker_processes_are_refused(path):
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(iter(DataLoader(dataset_of(path), batch_size=None, num_workers=1)))


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def newest_of(out):
    """A student: saved at the end, or the last checkpoint."""
    folders = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return out if (out / "config.json").exists() else folders[-1]


SCRIPT = """
import runpy, sys
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(cache, student, out, *more, launcher=(), example=EXAMPLE):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parent.parent)}
    words = (example, cache, student, out, *more)
    if launcher:
        command = [sys.executable, *launcher, *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_forked(SCRIPT, *words, env=environment, expect=0)
    return AutoModelForCausalLM.from_pretrained(newest_of(out)).state_dict()


@pytest.mark.slow
def test_the_example_trains_resumes_and_shares_its_work(path, tmp_path):
    student = make_student(tmp_path / "student")
    whole = run_example(path, student, tmp_path / "whole")
    logged = json.loads((tmp_path / "whole/checkpoint-18/trainer_state.json").read_text())
    first = logged["log_history"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(student)
    item = next(iter(dataset_of(path, seed=0)))
    loss, _ = StudentWithLoss(model, head_of(model))(item["batch"])
    assert first == pytest.approx(loss.item() / item["batch"].num_valid, rel=1e-4)

    # In the second of three epochs.
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "rest" / "checkpoint-10")
    rest = run_example(path, student, tmp_path / "rest", "resume")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)

    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    two = run_example(path, student, tmp_path / "two", launcher=launcher)
    assert all(torch.allclose(whole[name], two[name], atol=2e-6) for name in whole)


@pytest.mark.slow
def test_the_example_for_trl_trains(path, tmp_path):
    student = make_student(tmp_path / "student")
    trained = run_example(path, student, tmp_path / "sft", "6", example=SFT_EXAMPLE)
    logged = json.loads((tmp_path / "sft/checkpoint-6/trainer_state.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(student)
    item = next(iter(dataset_of(path, seed=0)))
    loss, _ = StudentWithLoss(model, head_of(model))(item["batch"])
    expected = loss.item() / item["batch"].num_valid
    assert logged["log_history"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(trained["lm_head.weight"], model.state_dict()["lm_head.weight"])
