"""FSDP2 over two gloo processes: the same run as one process alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fakes import make_cache, make_trace, make_traces
from processes import metrics_of, run_processes
from students import make_student
from transformers import AutoModelForCausalLM

from student_train.run.config import TrainConfig
from student_train.run.loop import train
from student_train.run.sharding import place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "stops", "changes"),
    [(True, False, {}), (False, True, {}), (True, True, {"lora_rank": 4})],
    ids=["tied", "untied", "adapters"],
)
def test_a_sharded_run_equals_one_process_and_is_gone_on_with_by_one(
    tmp_path, tied, stops, changes
):
    traces = make_traces(40)
    traces[3::4] = [make_trace(f"hard{n}", 30, without_entries=(9, 20)) for n in range(10)]
    cache = make_cache(tmp_path / "cache", traces)
    student = make_student(tmp_path / f"student{'-tied' if tied else ''}", tied=tied)
    whole = TrainConfig(
        cache=(cache,), student=student, out=tmp_path / "whole", lr=3e-3, batch_traces=4,
        batch_tokens=100, clip_norm=0.5, sharding="none", save_every=1000,
        heldout_share=0.25, eval_every=2, epochs=2, max_steps=10, **changes,
    )  # fmt: skip
    sharded = replace(whole, out=tmp_path / "sharded", sharding="full")
    moved = replace(sharded, sharding="none")
    train(whole)
    if not stops:  # to the end by two, or five steps by two and the rest by one
        run_processes(2, sharded)
    else:
        run_processes(2, sharded, stop_at=5)
        assert len(metrics_of(sharded)) == 5
        train(moved)

    one, other = metrics_of(whole), metrics_of(sharded)
    assert len(one) == len(other) == 10
    for left, right in zip(one, other, strict=True):
        for name in ("tokens", "num_hard_labels", "num_left_out_tokens"):
            assert left[name] == right[name]
        for name in ("loss", "kl", "ce", "grad_norm", "student_mass", "lr"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), (left["step"], name)
        assert left.get("heldout_kl", 0) == pytest.approx(right.get("heldout_kl", 0), rel=1e-5)
    assert one[-1]["num_hard_labels"] > 0  # teach, and weigh the same, in either
    assert max(metrics["grad_norm"] for metrics in one) > 0.5  # was clipped
    assert [values["step"] for values in one if "heldout_kl" in values] == [2, 4, 6, 8, 10]
    students = [
        AutoModelForCausalLM.from_pretrained(config.out / "model").state_dict()
        for config in (whole, sharded)
    ]
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all", "adapters"])
def test_sharded_bf16_stays_near_float32(tmp_path, changes):
    cache = make_cache(tmp_path / "cache", make_traces(40))
    whole = TrainConfig(
        cache=(cache,), student=make_student(tmp_path / "student-tied"), out=tmp_path / "whole",
        lr=3e-3, batch_traces=4, max_steps=5, **changes,
    )  # fmt: skip
    train(whole)
    half = replace(whole, out=tmp_path / "half", sharding="full", dtype="bfloat16")
    run_processes(2, half)

    one, other = metrics_of(whole), metrics_of(half)
    for left, right in zip(one, other, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-2)
        assert left["loss"] != right["loss"]
        assert left["teacher_mass"] == pytest.approx(right["teacher_mass"], rel=1e-6)
    weights = AutoModelForCausalLM.from_pretrained(half.out / "model").state_dict()
    assert all(value.dtype == torch.float32 for value in weights.values())


COMPARED = ("loss", "kl", "ce", "grad_norm", "student_mass", "teacher_mass", "top1_agreement")
LAYOUTS = {
    "hybrid": {"sharding": "hybrid"},  # two nodes of two processes
    "offloaded": {"sharding": "full", "offload": True},
    "two teams": {
        "context_parallel": 2,
        "loss_reduction": "sequence",
        "batch_tokens": 50,
        "gradient_checkpointing": True,
    },
    "one team": {
        "context_parallel": 4,
        "sharding": "full",
        "gradient_checkpointing": True,
        "packing": True,
    },
    "adapters": {"context_parallel": 2, "sharding": "hybrid", "lora_rank": 4, "packing": True},
}


@pytest.fixture
def base(tmp_path):
    """Four heads and two key-value heads: a team of four has copies of these."""
    traces = make_traces(24, lengths=(9, 61))
    traces[3::4] = [make_trace(f"hard{n}", 30, without_entries=(9, 20)) for n in range(6)]
    cache = make_cache(tmp_path / "cache", traces)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    return TrainConfig(
        cache=(cache,), student=make_student(tmp_path / "student-tied", **heads), lr=3e-3,
        out=tmp_path / "base", batch_traces=5, batch_tokens=100, clip_norm=0.5, heldout_share=0.3,
        eval_every=2, max_steps=3, tracker="none",
    )  # fmt: skip


@pytest.mark.slow
def test_every_layout_of_four_processes_equals_one(tmp_path, base):
    others = [replace(base, out=tmp_path / name, **LAYOUTS[name]) for name in LAYOUTS]
    run_processes(4, *others, on_each_node=2)
    for other in others:
        assert_equals_one_process(other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
def test_compiled_layers_that_are_split_equal_one_process(tmp_path, base):
    """Two processes, one layer and no measurement: compilation takes all of the time."""
    compiled = replace(
        base, student=make_student(tmp_path / "one-layer-tied", num_hidden_layers=1),
        batch_traces=2, heldout_share=0.0, eval_every=None, sharding="full", compile=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    run_processes(2, compiled)
    assert_equals_one_process(compiled)


def assert_equals_one_process(other):
    whole = replace(
        other, out=other.out.with_name(f"{other.out.name} alone"), sharding="none",
        context_parallel=1, compile=False, offload=False, packing=False,
    )  # fmt: skip
    train(whole)
    assert len(metrics_of(other)) == 3
    for left, right in zip(metrics_of(whole), metrics_of(other), strict=True):
        for name, value in left.items():
            where = (other.out.name, left["step"], name)
            if name in ("tokens", "num_hard_labels", "num_left_out_tokens", "num_empty_traces"):
                assert value == right[name], where
            elif name in COMPARED or name.startswith("heldout_"):
                assert right[name] == pytest.approx(value, rel=1e-5), where
    students = [
        AutoModelForCausalLM.from_pretrained(config.out / "model").state_dict()
        for config in (whole, other)
    ]
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("num_processes", "on_each"), [(4, 4), (4, 1), (6, 4)])
def test_hybrid_sharding_needs_several_nodes_of_one_size(monkeypatch, num_processes, on_each):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_each))
    accelerator = SimpleNamespace(num_processes=num_processes, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"got {num_processes} processes with {on_each} on this"):
        place(None, accelerator, "hybrid")


def test_sharding_over_one_process_is_refused(tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(4))
    config = TrainConfig(
        cache=(cache,), student=make_student(tmp_path / "student"), out=tmp_path / "run",
        sharding="full",
    )  # fmt: skip
    with pytest.raises(ValueError, match="there is one process; start several"):
        train(config)
