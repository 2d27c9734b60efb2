import json
import math
import resource
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fakes import TOKENS, make_cache, make_trace, make_traces, write_shards
from reference import trace_losses
from same_bits import assert_bitwise_equal
from students import make_model, make_student, make_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import student_train.run.finish as finish
import student_train.run.loop as loop
import student_train.run.step as step
from student_train.data.order import data_order
from student_train.data.traces import open_data
from student_train.errors import InterruptedRunError, NonFiniteLossError, OutOfMemoryError
from student_train.model.forward import StudentWithLoss
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from student_train.run.optimizers import make_optimizer, make_schedule
from teacher_cache.format import (
    CacheFormatError,
    CacheMismatchError,
    Trace,
    open_cache,
    seal_cache,
)
from teacher_cache.format.errors import repair_advice
from teacher_cache.terminal.option import changeable_names

# A resumed run reads a shard again.
TIMING = ("tokens_per_s", "train_s", "data_wait_share", "peak_memory_bytes", "bytes_read")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("train") / "cache", make_traces(40))


@pytest.fixture
def config(tmp_path, cache, student):
    """Builds a configuration of ten steps of an epoch, with changes."""

    def build(**changes):
        settings = {
            "cache": cache, "student": student, "out": tmp_path / "run", "lr": 3e-3,
            "batch_traces": 4, "batch_tokens": 150, "save_every": 1000,
        }  # fmt: skip
        settings |= changes
        return TrainConfig(**settings | {"cache": (settings["cache"],)})

    return build


def metrics_of(config):
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(config):
    return AutoModelForCausalLM.from_pretrained(config.out / "model").state_dict()


def last_state(config):
    checkpoint = max((config.out / "checkpoints").iterdir())
    return torch.load(checkpoint / "state.pt", weights_only=True)


def stop_after(monkeypatch, step, number=signal.SIGINT):
    """Let the process be asked to stop while it works on a step."""
    original = loop.global_counts
    calls = []

    def global_counts(*args):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(loop, "global_counts", global_counts)


@pytest.mark.slow
def test_the_student_learns_the_table(config):
    settings = config(epochs=8)
    result = train(settings)
    metrics = metrics_of(settings)

    assert result.num_steps == len(metrics) == 80
    assert [m["step"] for m in metrics] == list(range(1, 81))
    first, last = metrics[0], metrics[-1]
    assert first["kl"] > 0.8
    assert last["kl"] < 0.5 * first["kl"]
    assert last["student_mass"] > first["student_mass"]
    assert last["top1_agreement"] > 0.5 > first["top1_agreement"]
    assert 0.8 < last["teacher_mass"] < 1.0
    assert first["loss"] == pytest.approx(0.5 * first["kl"] + 0.5 * first["ce"], rel=1e-5)


@pytest.mark.slow
def test_the_finished_student_loads_and_ends_where_the_traces_end(config):
    settings = config(max_steps=2)
    result = train(settings)

    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.generation_config.eos_token_id == [0]
    assert AutoTokenizer.from_pretrained(result.model).get_vocab()["<think>"] == 1
    card = (result.model / "README.md").read_text()
    for fact in ("`table`", "whole traces", "0.5 KL", f"| kl | {result.metrics['kl']:.4f} |"):
        assert fact in card


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_ten_steps_equal_five_a_stop_and_five_more(config, tmp_path, monkeypatch, changes):
    whole = config(out=tmp_path / "whole", **changes)
    train(whole)
    parts = config(out=tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(InterruptedRunError, match="after step 5 of 10") as stopped:
            train(parts)
    assert stopped.value.signal_number == signal.SIGINT
    assert len(metrics_of(parts)) == 5
    train(parts)

    assert_bitwise_equal(weights_of(whole), weights_of(parts))
    assert_bitwise_equal(last_state(whole), last_state(parts))
    for one, other in zip(metrics_of(whole), metrics_of(parts), strict=True):
        assert {k: v for k, v in one.items() if k not in TIMING} == {
            k: v for k, v in other.items() if k not in TIMING
        }


@pytest.mark.slow
def test_dropout_goes_on_where_it_was(config, tmp_path, monkeypatch):
    student = make_student(tmp_path / "student", attention_dropout=0.3)
    whole = config(out=tmp_path / "whole", student=student, max_steps=4)
    train(whole)
    parts = config(out=tmp_path / "parts", student=student, max_steps=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            train(parts)
    train(parts)

    assert_bitwise_equal(weights_of(whole), weights_of(parts))


@pytest.mark.slow
def test_metrics_written_after_the_checkpoint_are_not_repeated(config, monkeypatch):
    settings = config(save_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "global_counts", failing_at(6, loop.global_counts))
        with pytest.raises(OSError, match="disk"):
            train(settings)
    assert [m["step"] for m in metrics_of(settings)] == [1, 2, 3, 4, 5]
    train(settings)

    assert [m["step"] for m in metrics_of(settings)] == list(range(1, 11))


def failing_at(call, function):
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise OSError("disk")
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torch.save", "fsync"])
def test_a_death_while_writing_a_checkpoint_keeps_the_one_before(config, monkeypatch, victim):
    settings = config(save_every=3)
    with monkeypatch.context() as patch:
        if victim == "torch.save":  # two per checkpoint: random state, then weights
            patch.setattr("torch.save", failing_at(4, torch.save))
        else:
            fsync = failing_at(8, lambda path: None)
            patch.setattr("teacher_cache.format.files.fsync", fsync)
        with pytest.raises(OSError, match="disk"):
            train(settings)
    assert [path.name for path in (settings.out / "checkpoints").glob("step-*")] == [
        "step-000000003"
    ]
    result = train(settings)

    assert result.num_steps == 10
    assert not list((settings.out / "checkpoints").glob(".tmp-*"))


def test_a_finished_run_says_so_and_does_nothing(config):
    settings = config(max_steps=2)
    train(settings)
    before = (settings.out / "metrics.jsonl").read_bytes()
    again = train(settings)

    assert again.was_finished
    assert again.num_steps == 2
    assert (settings.out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-4}, "lr: 0.003 before, 0.0001 now"),
        ({"lead_span": 0.5}, "lead_span: None before, 0.5 now"),
        ({"sections": ("cot",)}, "sections: "),
        ({"seed": 3}, "seed: 0 before, 3 now"),
    ],
)
def test_going_on_with_other_settings_is_refused(config, change, message, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(InterruptedRunError):
        train(config())
    with pytest.raises(ValueError, match=message):
        train(config(**change))


@pytest.mark.slow
def test_a_run_resumes_with_other_values_of_what_may_change(config, monkeypatch):
    changed = {
        "save_every": 2, "keep_last": 2, "log_every": 2, "batch_tokens": 100,
        "gradient_checkpointing": True, "packing": False, "tracker": "none",
    }  # fmt: skip
    assert changed.keys() <= changeable_names(TrainConfig)
    stop_after(monkeypatch, 3)
    with pytest.raises(InterruptedRunError):
        train(config(max_steps=5))
    result = train(config(max_steps=5, **changed))

    assert result.num_steps == 5
    written = json.loads((config().out / "config.json").read_text())["config"]
    assert {name: written[name] for name in changed} == changed


@pytest.mark.slow
def test_going_on_with_another_cache_or_student_is_refused(config, tmp_path):
    train(config(max_steps=1))
    other_cache = make_cache(tmp_path / "cache", make_traces(3))
    other_student = make_student(tmp_path / "student", seed=1)

    with pytest.raises(ValueError, match="cache_fingerprint: "):
        train(config(max_steps=1, cache=other_cache))
    with pytest.raises(ValueError, match="student_fingerprint: "):
        train(config(max_steps=1, student=other_student))


@pytest.mark.slow
def test_a_run_on_an_unfinished_capture_goes_on_with_what_it_began_with(
    config, tmp_path, monkeypatch
):
    traces = make_traces(32)
    growing = write_shards(tmp_path / "growing", traces[:16])
    with pytest.raises(CacheMismatchError, match="not complete"):
        train(config(cache=growing))
    settings = config(cache=growing, allow_unsealed=True, epochs=2)
    whole = config(cache=growing, allow_unsealed=True, epochs=2, out=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(InterruptedRunError, match="3 of 8"):
            train(settings)
    write_shards(growing, traces[16:], first_worker=4)
    with pytest.raises(CacheMismatchError, match="not complete"):
        train(replace(settings, allow_unsealed=False))
    seal_cache(growing)
    assert train(replace(settings, allow_unsealed=False)).num_steps == 8

    assert_bitwise_equal(weights_of(whole), weights_of(settings))


@pytest.mark.slow
def test_a_moved_run_goes_on(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(InterruptedRunError):
            train(config())
    moved = config(out=tmp_path / "elsewhere", batch_tokens=90, save_every=7)
    config().out.rename(moved.out)

    assert train(moved).num_steps == 10
    assert len(metrics_of(moved)) == 10


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")

    with pytest.raises(ValueError, match="expected a new or empty folder"):
        train(config())


def test_a_run_whose_disk_was_full_when_it_began_begins(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.tmp-config.json-0123abcd").write_text("")

    assert train(config(max_steps=1)).num_steps == 1


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_stops_the_run_which_can_go_on(config):
    settings = config(max_steps=1, tracker="none")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # half of what it needs
    try:
        with pytest.raises(OSError, match="the checkpoint cannot be written"):
            train(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (settings.out / "model").exists()
    assert not train(settings).was_finished


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_a_generation_config_that_transformers_would_not_write_is_mended(
    config, tmp_path, caplog, changes
):
    student = make_student(tmp_path / "student")
    file = tmp_path / "student/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6}))
    result = train(config(student=student, max_steps=1, **changes))

    written = json.loads((result.model / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"]) == (True, 0.6)
    assert "asks for sampling without do_sample" in caplog.text


def test_a_generation_config_that_cannot_be_mended_is_refused_before_a_step(config, tmp_path):
    student = make_student(tmp_path / "student")
    file = tmp_path / "student/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"early_stopping": True}))
    with pytest.raises(ValueError, match=r"fix its generation_config\.json"):
        train(config(student=student, max_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("loss_reduction", ["token", "sequence"])
def test_accumulation_does_not_change_the_result(config, tmp_path, loss_reduction):
    settings = {"batch_traces": 8, "max_steps": 3, "loss_reduction": loss_reduction}
    whole = config(out=tmp_path / "whole", batch_tokens=10_000, **settings)
    parts = config(out=tmp_path / "parts", batch_tokens=1, **settings)
    train(whole)
    train(parts)

    for one, other in zip(metrics_of(whole), metrics_of(parts), strict=True):
        for name in ("loss", "kl", "ce", "grad_norm", "student_mass", "tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(value, weights_of(parts)[name], rtol=1e-3, atol=1e-5)


def test_packing_is_for_accelerators_unless_asked_for(config):
    assert [config().packs_on(device) for device in ("cpu", "cuda")] == [False, True]
    assert config(packing=True).packs_on("cpu")
    assert not config(packing=False).packs_on("cuda")
    assert not config(live_teacher="t").packs_on("cuda")


def test_a_student_that_would_mix_traces_says_so_and_trains(config, tmp_path, caplog):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1))
    mamba.save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    caplog.set_level("INFO")
    train(config(student=str(tmp_path / "student"), packing=True, max_steps=1))

    assert "MambaForCausalLM would mix traces in one row: each trace gets its own" in caplog.text


@pytest.mark.parametrize("loss_reduction", ["token", "sequence"])
def test_normalisation_is_what_it_says(config, tmp_path, loss_reduction):
    # Against the cross entropy by hand; per trace where every trace weighs the same.
    traces = [make_trace("long", 60), make_trace("short", 20)]
    cache = make_cache(tmp_path / "cache", traces)
    settings = config(cache=cache, loss_reduction=loss_reduction, ce_weight=1.0, max_steps=1)
    train(settings)

    model = make_model()
    per_trace = []
    for trace in traces:
        ids = torch.from_numpy(trace.token_ids.astype(np.int64))
        logits = model(ids[None]).logits[0, :-1]
        per_trace.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    by_token = torch.cat(per_trace).mean()
    by_trace = torch.stack([losses.mean() for losses in per_trace]).mean()
    expected = by_token if loss_reduction == "token" else by_trace
    assert metrics_of(settings)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(by_token - by_trace) > 1e-3


@pytest.mark.parametrize("ce_weight", [0.0, 0.25, 1.0])
def test_hard_labels_alone_teach_where_there_is_no_distribution(
    config, tmp_path, caplog, ce_weight
):
    caplog.set_level("INFO")
    holes = make_trace("holes", 40, without_entries=(5, 20, 21, 39))  # the response begins at 10
    traces = [holes, make_trace("whole", 24)]
    settings = config(
        cache=make_cache(tmp_path / "cache", traces), ce_weight=ce_weight, max_steps=1
    )
    train(settings)

    model = make_model().double()
    losses = [
        trace_losses(model(torch.from_numpy(t.token_ids).long()[None]).logits[0], t, ce_weight)
        for t in traces
    ]
    (found,) = metrics_of(settings)
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["tokens"] == len(torch.cat(losses)) == (58 if ce_weight == 0 else 61)
    counts = (found["num_hard_labels"], found["num_left_out_tokens"])
    assert counts == ((0, 3) if ce_weight == 0 else (3, 0))
    said = "3 tokens without a distribution were left out of the loss: --ce-weight is 0"
    if ce_weight:
        said = "3 of 61 loss tokens had no distribution: the hard label alone taught them"
    assert said in caplog.text
    kept = [np.exp(t.top_logprobs).sum() for t in traces]
    assert found["teacher_mass"] == pytest.approx(sum(kept) / 58, rel=1e-4)


@pytest.mark.slow
def test_half_a_lead_span_reads_fewer_bytes_and_trains_on_fewer_tokens(config, tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(8, lengths=(200, 300)))
    whole = config(cache=cache, out=tmp_path / "whole", batch_tokens=4096)
    half = config(cache=cache, out=tmp_path / "half", batch_tokens=4096, lead_span=0.5)
    results = [train(settings).metrics for settings in (whole, half)]

    assert results[1]["bytes_read"] < 0.6 * results[0]["bytes_read"]
    assert results[1]["tokens"] == pytest.approx(0.5 * results[0]["tokens"], rel=0.02)


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing_train_too(config, tmp_path):
    plain = config(out=tmp_path / "plain", max_steps=3)
    again = config(out=tmp_path / "again", max_steps=3, gradient_checkpointing=True)
    train(plain)
    train(again)
    for one, other in zip(metrics_of(plain), metrics_of(again), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)

    Accelerator().state._reset_state(reset_partial_state=True)
    half = config(out=tmp_path / "half", max_steps=3, dtype="bfloat16")
    train(half)
    Accelerator().state._reset_state(reset_partial_state=True)
    for one, other in zip(metrics_of(plain), metrics_of(half), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert one["loss"] != other["loss"]
    assert all(value.dtype == torch.float32 for value in weights_of(half).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 5e-4, 1e-3, 1e-3, 1e-3]),
        ("linear", [0.0, 5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]),
        ("cosine", [0.0, 5e-4, 1e-3, 7.5e-4, 2.5e-4]),
        # Up from a 25th and down to a 250,000th along half cosines, the peak in the second step.
        ("onecycle", [4e-5, 1e-3, 7.50001e-4, 2.50003e-4, 4e-9]),
    ],
)
def test_the_learning_rate_follows_the_schedule(config, schedule, expected):
    settings = config(lr=1e-3, schedule=schedule, warmup=0.4, max_steps=5)
    train(settings)

    assert [m["lr"] for m in metrics_of(settings)] == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_one_cycle_of_a_few_steps_can_be_run(num_steps, warmup):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule("onecycle", optimizer, warmup=warmup, num_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.04, 1.0, 4e-6][:num_steps])


@pytest.mark.slow
def test_one_cycle_moves_the_momentum_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    whole = config(out=tmp_path / "whole", schedule="onecycle", warmup=0.3)
    parts = config(out=tmp_path / "parts", schedule="onecycle", warmup=0.3)
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(InterruptedRunError):
            train(parts)
    (group, _) = last_state(parts)["optimizer"]["param_groups"]
    assert group["betas"][0] < 0.95
    train(parts)

    assert_bitwise_equal(last_state(whole), last_state(parts))


@pytest.mark.slow
def test_adafactor_trains_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    whole = config(out=tmp_path / "whole", optimizer="adafactor", max_steps=4)
    parts = config(out=tmp_path / "parts", optimizer="adafactor", max_steps=4)
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            train(parts)
    train(parts)

    assert_bitwise_equal(last_state(whole), last_state(parts))
    state = last_state(whole)["optimizer"]["state"]["model.embed_tokens.weight"]
    assert state["exp_avg_sq_row"].ndim == 1  # not a moment per weight


def test_an_optimizer_that_is_not_installed_is_refused(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchao or bitsandbytes"):
        make_optimizer("adamw8bit", torch.nn.Linear(2, 2), lr=1e-3, weight_decay=0.0)


@pytest.mark.slow
def test_as_many_checkpoints_stay_as_asked(config):
    settings = config(save_every=2, keep_last=3)
    train(settings)

    names = sorted(path.name for path in (settings.out / "checkpoints").iterdir())
    assert names == ["step-000000006", "step-000000008", "step-000000010"]


@pytest.mark.slow
def test_running_out_of_memory_says_what_to_lower(config, monkeypatch):
    def forward(self, batch, loss_factor):
        return torch.empty(2**60, dtype=torch.uint8)  # which no machine has

    monkeypatch.setattr(StudentWithLoss, "forward", forward)
    with pytest.raises(OutOfMemoryError, match="lower --batch-tokens \\(now 150\\) or") as error:
        train(config())
    assert "add --gradient-checkpointing" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(OutOfMemoryError) as error:
        train(config(gradient_checkpointing=True))
    assert "add --gradient-checkpointing" not in str(error.value)


@pytest.mark.slow
def test_a_gpus_factor_stands_in_the_tokens_weights_and_gives_the_same_step(config, monkeypatch):
    found = []
    for factors in (None, lambda accelerator, divisor: (accelerator.num_processes / divisor, 1.0)):
        if factors is not None:
            monkeypatch.setattr(step, "_loss_factors", factors)
        run = config(max_steps=1, out=config().out / str(len(found)))
        train(run)
        found.append([metrics_of(run)[0][name] for name in ("loss", "grad_norm", "kl", "ce")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(config, monkeypatch):
    def forward(self, batch, loss_factor):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(StudentWithLoss, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1"):
        train(config())


@pytest.mark.slow
def test_weights_and_biases_gets_the_metrics_and_what_runs_are_compared_by(
    config, monkeypatch, tmp_path
):
    logged = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(
        "accelerate.tracking.WandBTracker.log",
        lambda self, values, step=None, **_: logged.append((step, values)),
    )
    initialised = []
    real = Accelerator.init_trackers
    monkeypatch.setattr(
        Accelerator, "init_trackers",
        lambda *args, **named: (initialised.append(named), real(*args, **named)),
    )  # fmt: skip
    settings = config(
        max_steps=2, tracker="wandb", lead_span=0.5, out=tmp_path / "s/cells/span-0.5_seed-0/run"
    )
    train(settings)

    shown = initialised[0]["init_kwargs"]["wandb"]
    assert (shown["name"], shown["group"]) == ("span-0.5_seed-0", "s")
    assert shown["notes"].endswith(": lead span 0.5, seed 0")
    assert shown["config"]["lead_span"] == 0.5
    assert [step for step, _ in logged] == [1, 2]
    assert logged[1][1]["loss/loss"] == metrics_of(settings)[1]["loss"]
    assert not (settings.out / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        train(config(tracker="wandb"))


@pytest.mark.slow
def test_weight_decay_and_clipping_change_the_weights(config, tmp_path):
    results = []
    for number, change in enumerate([{}, {"weight_decay": 0.9}, {"clip_norm": 0.01}]):
        settings = config(out=tmp_path / str(number), max_steps=4, lr=1e-2, warmup=0.0, **change)
        train(settings)
        results.append(weights_of(settings)["model.embed_tokens.weight"])

    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.slow
def test_clipping_by_zero_does_not_clip(config, tmp_path):
    results = []
    for number, clip_norm in enumerate([0.0, 1e9, 1e-3]):
        settings = config(out=tmp_path / str(number), max_steps=2, warmup=0.0, clip_norm=clip_norm)
        train(settings)
        results.append(weights_of(settings)["model.embed_tokens.weight"])

    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.slow
def test_fewer_lines_are_logged_when_asked_and_always_the_last(config):
    settings = config(log_every=4)
    train(settings)

    assert [m["step"] for m in metrics_of(settings)] == [4, 8, 10]


def test_tensorboard_shows_the_metrics_in_groups_and_the_settings(config, tmp_path):
    heldout = make_cache(tmp_path / "heldout", make_traces(2, seed=5))
    settings = config(max_steps=3, heldout_cache=heldout, lead_span=0.5)
    train(settings)

    events = EventAccumulator(str(settings.out / "tensorboard")).Reload()
    lines = metrics_of(settings)
    for tag, name in (("loss/loss", "loss"), ("heldout/kl_cot", "heldout_kl_cot")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        measured = [line for line in lines if name in line]
        assert shown == [(m["step"], pytest.approx(m[name], rel=1e-5)) for m in measured]
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"loss", "optimizer", "speed", "memory", "data", "heldout"}
    # Hyperparameters, by which a sweep's runs are compared, are the run's own.
    found = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"lead_span" in found
    assert not [path for path in (settings.out / "tensorboard").iterdir() if path.is_dir()]
    (text,) = events.Tensors("settings/text_summary")
    assert b"| lead_span | 0.5 |" in text.tensor_proto.string_val[0]
    assert b": lead span 0.5, seed 0" in text.tensor_proto.string_val[0]


def test_steps_without_a_valid_token_are_counted_and_change_nothing(config, tmp_path, caplog):
    bare = [make_trace(f"bare{n}", 30, without_entries=range(30)) for n in range(3)]
    cache = make_cache(tmp_path / "cache", [*bare, make_trace("full", 30)])
    settings = config(cache=cache, batch_traces=1, weight_decay=0.5, ce_weight=0.0)
    train(settings)

    metrics = metrics_of(settings)
    assert sorted(m["tokens"] for m in metrics) == [0, 0, 0, 29]
    assert metrics[-1]["num_empty_steps"] == metrics[-1]["num_empty_traces"] == 3
    assert "3 times a trace had no loss token" in caplog.text
    assert "3 of 4 steps" in caplog.text


def test_traces_without_a_valid_token_are_counted_beside_others(config, tmp_path, caplog):
    bare = [make_trace(f"bare{n}", 30, without_entries=range(30)) for n in range(3)]
    cache = make_cache(tmp_path / "cache", [*bare, make_trace("full", 30)])
    settings = config(cache=cache, batch_traces=4, epochs=2, ce_weight=0.0)
    train(settings)

    assert [m["num_empty_traces"] for m in metrics_of(settings)] == [3, 6]
    assert metrics_of(settings)[-1]["num_empty_steps"] == 0
    assert "6 times a trace had no loss token" in caplog.text


def test_a_student_that_the_last_step_broke_is_not_written(config, monkeypatch):
    real = finish.gathered_weights

    def broken(model):
        weights = real(model)
        return {name: weight / 0 for name, weight in weights.items()}

    monkeypatch.setattr(finish, "gathered_weights", broken)
    settings = config(max_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"the last step left .* without finite numbers"):
        train(settings)
    assert not (settings.out / "model").exists()


def test_a_loss_that_is_no_number_stops_the_run_naming_its_traces(config, cache):
    settings = config(lr=1e30, warmup=0.0, save_every=1)
    with pytest.raises(NonFiniteLossError) as error:
        train(settings)

    num_done = len(metrics_of(settings))
    order = data_order(open_data([cache]), seed=0, epoch=0)
    first = num_done * 4
    places = zip(order.shard[first : first + 4], order.row[first : first + 4], strict=True)
    names = [open_cache(cache).shards[shard].traces[row].trace_id for shard, row in places]
    assert f"step {num_done + 1}: the loss is" in str(error.value)
    assert ", ".join(names) in str(error.value)
    assert (
        last_state(settings)["optimizer"]["state"]["model.embed_tokens.weight"]["step"] == num_done
    )


def test_a_student_with_another_tokenizer_is_refused(config, tmp_path):
    student = make_student(tmp_path / "student", [*TOKENS[:-1], "other"])

    with pytest.raises(CacheMismatchError, match=r"'table'.*cache-teacher retokenize"):
        train(config(student=student))


def test_a_student_with_fewer_rows_than_tokens_is_refused(config, tmp_path):
    student = make_student(tmp_path / "student", vocab_size=40, eos_token_id=0)

    with pytest.raises(CacheMismatchError, match="has 40 ids, its tokenizer 41: it lacks tokens"):
        train(config(student=student))


def test_a_student_with_a_padded_vocabulary_trains(config, tmp_path):
    student = make_student(tmp_path / "student", vocab_size=64)

    assert math.isfinite(train(config(student=student, max_steps=1)).metrics["loss"])


def test_a_cache_shifted_by_one_is_refused_before_a_step_is_made(config, tmp_path, monkeypatch):
    shifted = [replace(trace, token_ids=np.roll(trace.token_ids, 1)) for trace in make_traces(1)]
    with monkeypatch.context() as patch:
        patch.setattr(Trace, "validate", lambda trace: None)
        cache = make_cache(tmp_path / "cache", shifted)
    settings = config(cache=cache)

    with pytest.raises(CacheFormatError, match=r"w000.*token \d of trace 't0' .* other tokens"):
        train(settings)
    assert metrics_of(settings) == []


def test_a_missing_shard_is_refused_by_name(config, tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(8))
    (tmp_path / "cache/shards/w001-00000.arrow").unlink()

    with pytest.raises(CacheFormatError, match=r"w001-00000\.arrow"):
        train(config(cache=cache))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["damaged", "removed", "cut"])
def test_a_shard_lost_while_training_is_named_with_what_verify_says(
    config, tmp_path, monkeypatch, loss
):
    """Kept to the end of the run: the stream reads a shard when it is first needed."""
    cache = make_cache(tmp_path / "cache", make_traces(40))
    settings = config(cache=cache, save_every=1)
    last = data_order(open_data([cache]), seed=0, epoch=0).shard[-1]
    file = tmp_path / f"cache/shards/{open_cache(cache).shards[last].name}.arrow"
    content = file.read_bytes()
    real = loop.open_stream

    def open_stream(run):
        if loss == "removed":
            file.unlink()
        else:
            half = len(content) // 2
            rest = b"" if loss == "cut" else bytes(100) + content[half + 100 :]
            file.write_bytes(content[:half] + rest)
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_stream", open_stream)
        with pytest.raises(CacheFormatError) as error:
            train(settings)
    assert file.name in str(error.value)
    assert str(error.value).endswith(f"; {repair_advice(cache)}")
    assert f"cache-teacher verify {cache} --repair" in str(error.value)
    file.write_bytes(content)
    assert train(settings).num_steps == 10


def test_a_student_that_does_not_exist_is_refused_in_one_line(config, tmp_path):
    with pytest.raises(ValueError, match=r"model '.*nowhere' cannot be loaded: ") as error:
        train(config(student=str(tmp_path / "nowhere")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("selection", "capture_prompt"),
    [
        ({"sections": ("answer",), "lead_span": 0.5}, True),
        ({"trace_tokens": 1}, True),
        ({"sections": ("prompt",)}, False),
        ({"lead_span": 0.2}, False),
    ],
)
def test_a_selection_that_leaves_nothing_is_refused(config, tmp_path, selection, capture_prompt):
    cache = make_cache(tmp_path / "cache", make_traces(4), capture_prompt=capture_prompt)

    with pytest.raises(ValueError, match="nothing to train on"):
        train(config(cache=cache, **selection))


def test_an_empty_cache_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="the cache holds no trace"):
        train(config(cache=make_cache(tmp_path / "cache", [])))


def test_traces_longer_than_the_student_are_refused_with_a_remedy(config, tmp_path):
    student = make_student(tmp_path / "student", max_position_embeddings=32)

    with pytest.raises(ValueError, match="the student has 32 positions; use --trace-tokens 33"):
        train(config(student=student))
    assert train(config(student=student, trace_tokens=33, max_steps=1)).num_steps == 1


def test_training_outside_the_main_thread_works(config):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config(max_steps=1))))
    thread.start()
    thread.join()

    assert results[0].num_steps == 1


def test_handlers_of_signals_are_put_back(config):
    before = signal.getsignal(signal.SIGINT)
    train(config(max_steps=1))

    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs: expected a number at least 1, got 0"),
        ({"lr": -1.0}, "--lr: expected a number at least 0"),
        ({"ce_weight": 1.2}, "--ce-weight: expected a number from 0 to 1"),
        ({"schedule": "zigzag"}, "--schedule: expected one of cosine, linear, constant, onecycle"),
        ({"sharding": "full", "optimizer": "adafactor"}, "sharding full: adafactor works on whole"),
        ({"sharding": "hybrid", "optimizer": "adafactor"}, "sharding hybrid: adafactor works on"),
        ({"sharding": "full", "optimizer": "adamw8bit"}, "states .* split cannot be checkpointed"),
        ({"dtype": "int8"}, "--dtype: expected one of float32, bfloat16"),
        ({"packing": True, "live_teacher": "t"}, "packing: a live teacher reads rows of one"),
        ({"loss_reduction": "words"}, "--loss-reduction: expected one of token, sequence"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)
