"""One flipped bit in any file of a run: the same student in the end, or the file's name."""

import hashlib
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import make_cache, make_traces
from students import make_student

import student_train.run.loop as loop
from student_train.errors import InterruptedRunError
from student_train.run import checkpoint_writer
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format.checksums import DamagedFileError, publish_record, read_record

PLACES = ["first", "last", *(f"drawn {n}" for n in range(1, 8))]
CHECKPOINTS = ("checkpoints/step-000000004", "checkpoints/step-000000006")
OF_CHECKPOINT = ("state.pt", "random-00000.pt", "progress.json", "checksums.json")
NEWEST = [f"{CHECKPOINTS[1]}/{name}" for name in OF_CHECKPOINT]
OLDER = [f"{CHECKPOINTS[0]}/{name}" for name in OF_CHECKPOINT]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of ten steps that was stopped after six, and the student it would have become."""
    folder = tmp_path_factory.mktemp("damage")
    config = TrainConfig(
        cache=(make_cache(folder / "cache", make_traces(40)),),
        student=make_student(folder / "student", attention_dropout=0.1), out=folder / "stopped",
        lr=3e-3, batch_traces=4, save_every=2, keep_last=2, tracker="none",
    )  # fmt: skip
    original, num_calls = loop.global_counts, 0

    def global_counts(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "global_counts", global_counts)
        with pytest.raises(InterruptedRunError):
            train(config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == [
        "step-000000004", "step-000000006",
    ]  # fmt: skip
    whole = replace(config, out=folder / "whole")
    train(whole)
    return config, whole


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of the stopped run."""
    config, _ = stopped
    shutil.copytree(config.out, tmp_path / "run")
    return replace(config, out=tmp_path / "run")


def student_of(config):
    return hashlib.sha256((config.out / "model/model.safetensors").read_bytes()).hexdigest()


def flip(file, place):
    """Flip a bit: the first or last byte's, or one drawn by a seed."""
    data = bytearray(file.read_bytes())
    rng = random.Random(f"{file.name}/{place}")
    offset = {"first": 0, "last": len(data) - 1}.get(place, rng.randrange(len(data)))
    data[offset] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", *NEWEST, *OLDER])
def test_a_flipped_bit_gives_the_same_student_or_is_named(stopped, copied, caplog, name, place):
    flip(copied.out / name, place)
    try:
        train(copied)
    except DamagedFileError as error:
        assert str(error).startswith(f"{copied.out / name}: damaged")
        assert "\n" not in str(error)
        assert name in ("config.json", "metrics.jsonl")
        assert not (copied.out / "model").exists()
        return
    assert name != "config.json"
    assert student_of(copied) == student_of(stopped[1])
    said = [message for message in caplog.messages if str(copied.out / name) in message]
    assert len(said) == (name not in OLDER)
    if said:
        assert "The run is resumed from step-000000004; step-000000006 is put aside as" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "last", "drawn 1"])
@pytest.mark.parametrize("file", ["state.pt", "progress.json"])
def test_without_a_whole_checkpoint_nothing_is_trained(copied, file, place):
    for folder in CHECKPOINTS:
        flip(copied.out / folder / file, place)
    with pytest.raises(DamagedFileError, match=r"step-000000006/.*No other checkpoint is whole: "):
        train(copied)
    assert len(list((copied.out / "checkpoints").iterdir())) == 2
    shutil.rmtree(copied.out / "checkpoints")  # as the message says
    assert train(copied).num_steps == 10


@pytest.mark.slow
def test_a_missing_file_of_a_checkpoint_is_as_a_damaged_one(stopped, copied, caplog):
    (copied.out / CHECKPOINTS[1] / "random-00000.pt").unlink()
    train(copied)

    assert student_of(copied) == student_of(stopped[1])
    assert "random-00000.pt: missing." in caplog.text


@pytest.mark.slow
def test_the_best_checkpoint_must_be_whole_where_it_may_be_asked_for(copied, tmp_path):
    config = replace(
        copied, out=tmp_path / "best", heldout_share=0.2, eval_every=1, select="heldout",
        lr=1.0, warmup=1.0, save_every=100, max_steps=6, keep_last=1,
    )  # fmt: skip
    train(config)  # which gets worse and worse
    shutil.rmtree(config.out / "model")
    best, last = sorted((config.out / "checkpoints").iterdir())
    assert last.name == "step-000000006"
    flip(best / "state.pt", "drawn 1")
    with pytest.raises(DamagedFileError, match=rf"{best.name}/state\.pt: damaged"):
        train(config)
    assert not (config.out / "model").exists()


@pytest.fixture
def finished(stopped, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(stopped[1].out, tmp_path / "run")
    return replace(stopped[1], out=tmp_path / "run")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["config.json", "result.json", "model/model.safetensors", "model/config.json",
     "model/tokenizer.json", "model/generation_config.json", "model/checksums.json"],
)  # fmt: skip
def test_a_damaged_student_is_not_called_finished_and_is_written_again(
    stopped, finished, name, place
):
    flip(finished.out / name, place)
    with pytest.raises(DamagedFileError) as error:
        train(finished)
    assert str(error.value).startswith(f"{finished.out / name}: damaged")
    if name != "config.json":
        shutil.rmtree(finished.out / "model")  # as the message says
        assert not train(finished).was_finished
        assert student_of(finished) == student_of(stopped[1])


def test_a_run_that_trains_a_damaged_student_further_is_refused(finished, tmp_path):
    flip(finished.out / "model/model.safetensors", "last")
    config = replace(finished, student=str(finished.out / "model"), out=tmp_path / "next")
    with pytest.raises(DamagedFileError, match=r"model\.safetensors: damaged"):
        train(config)


def test_a_checkpoint_on_a_full_disk_says_what_to_do():
    with pytest.raises(OSError, match=r"/dev/full: the checkpoint cannot be written.*free some"):
        checkpoint_writer._save({"weight": torch.zeros(1 << 16)}, Path("/dev/full"))


def test_a_record_is_read_as_it_was_written_and_no_other_way(tmp_path):
    file = tmp_path / "record.json"
    values = {"a": [1.5, "é", None], "b": {"c": -1e-7}}
    publish_record(file, values)
    assert read_record(file, "") == values
    text = file.read_bytes()
    for changed in (b"", b"[]", b"{}", text.replace(b"1.5", b"1.7"), text[:-3]):
        file.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"record\.json: damaged.*Do this\.$"):
            read_record(file, "Do this.")
