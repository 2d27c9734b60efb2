"""Runs that are extended, end early, or diverge."""

import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch
from fakes import make_cache, make_traces
from students import make_student
from transformers import AutoModelForCausalLM

import student_train.run.state as run_state
from student_train.errors import DivergedLossError
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from student_train.run.state import RunState


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("length")
    return make_cache(folder / "cache", make_traces(8)), make_student(folder / "student")


@pytest.fixture
def config(inputs, tmp_path):
    def build(out="run", **changes):
        cache, student = inputs
        settings = {
            "cache": (cache,), "student": student, "out": tmp_path / out, "lr": 1e-3,
            "batch_traces": 4, "schedule": "constant", "warmup": 0.0, "tracker": "none",
        }  # fmt: skip
        return TrainConfig(**(settings | changes))

    return build


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_a_finished_run_is_extended_as_if_it_had_been_longer(config):
    first = config(epochs=1)
    train(first)
    before = weights_of(first.out / "model")
    longer = config(epochs=2)
    result = train(longer)
    assert (result.num_steps, result.was_finished) == (4, False)
    assert train(longer).was_finished
    train(config("whole", epochs=2))

    whole = weights_of(config("whole").out / "model")
    assert all(torch.equal(whole[k], v) for k, v in weights_of(longer.out / "model").items())
    kept = weights_of(longer.out / "model-step-000000002")
    assert all(torch.equal(before[name], weight) for name, weight in kept.items())


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        ({"schedule": "cosine"}, {"epochs": 2}, "only one of --schedule constant can be extended"),
        ({"epochs": 2, "max_steps": 2}, {"max_steps": 1}, "max_steps: 2 before, 1 now"),
        ({"warmup": 0.5}, {"epochs": 9}, "9 of 18 steps would be warm-up"),
        ({"max_steps": 2}, {"max_steps": 10}, "leave no step after 2: raise --epochs"),
    ],
)
def test_a_run_that_cannot_be_extended_says_why_and_keeps_its_student(config, first, then, reason):
    settings = config(**first)
    train(settings)
    with pytest.raises(ValueError, match=reason):
        train(config(**(first | then)))
    assert (settings.out / "model").is_dir()
    assert train(settings).was_finished


@pytest.mark.slow
def test_a_run_ends_when_the_heldout_kl_has_not_fallen_for_long_enough(config):
    settings = config(
        epochs=20, eval_every=1, patience=2, heldout_share=0.4, lr=3.0, select="heldout"
    )
    result = train(settings)
    lines = (settings.out / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line)["heldout_kl"] for line in lines]
    assert result.num_steps == len(measured) < 40
    best = measured.index(min(measured))
    assert len(measured) == best + 3
    assert train(settings).was_finished
    longer = replace(settings, epochs=30)
    with pytest.raises(ValueError, match=r"leave no step .* --patience"):
        train(longer)
    assert (settings.out / "model").is_dir()
    assert train(replace(settings, patience=4)).num_steps == len(measured) + 2


def test_a_loss_that_grows_tenfold_over_some_steps_has_diverged():
    state = RunState()
    for loss in (5.0, 1.0, *[0.2] * 40, 3.0, 200.0):  # two bad steps are no divergence
        state.note_loss(loss)
        assert not state.has_diverged
    for _ in range(40):
        state.note_loss(3.0)
    assert state.has_diverged
    assert state.mean_loss == pytest.approx(3.0, rel=0.5)
    at_once = RunState()  # the second step broke it
    at_once.note_loss(5.0)
    for _ in range(10):
        at_once.note_loss(5000.0)
    assert at_once.has_diverged
    small = RunState()
    for loss in (1e-6, *[0.05] * 50):
        small.note_loss(loss)
    assert not small.has_diverged
    uneven = RunState()
    for loss in (0.05, *[1.0] * 50):  # the first traces were easy
        uneven.note_loss(loss)
        assert not uneven.has_diverged
    noisy, random = RunState(), Random(0)
    for _ in range(10_000):  # half of the steps are beyond a factor of 2.3 either way
        noisy.note_loss(math.exp(random.gauss(0, 1.25)))
        assert not noisy.has_diverged


@pytest.mark.slow
def test_a_diverging_run_stops_with_advice_and_keeps_its_checkpoint(config, monkeypatch):
    monkeypatch.setattr(run_state, "_LARGEST_GROWTH", 0.999)
    settings = config(epochs=6, save_every=4, lr=1e-2)
    with pytest.raises(DivergedLossError, match=r"diverges\. Start over .* with a lower --lr"):
        train(settings)
    assert not (settings.out / "model").exists()
    assert [one.name for one in settings.out.glob("checkpoints/step-*")] != []


@pytest.mark.slow
def test_a_diverging_run_without_a_checkpoint_promises_none(config, monkeypatch):
    monkeypatch.setattr(run_state, "_LARGEST_GROWTH", 0.999)
    with pytest.raises(DivergedLossError, match=r"longer --warmup\.$"):
        train(config(epochs=6, lr=1e-2))
