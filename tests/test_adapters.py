import json

import pytest
import torch
from fakes import make_cache, make_traces
from peft import PeftModel
from students import EXPERTS, make_model, make_student
from transformers import AutoModelForCausalLM

from student_train.model.adapters import add_adapters
from student_train.model.flops import FlopFormula
from student_train.model.load import load_model
from student_train.model.lora import Lora
from student_train.run.config import TrainConfig
from student_train.run.loop import train

IDS = torch.arange(20)[None]


@pytest.fixture
def config(tmp_path):
    """Builds a run of two steps with adapters, in a folder of its own."""
    cache = make_cache(tmp_path / "cache", make_traces(8))

    def build(out, student=None, **changes):
        settings = {
            "cache": (cache,), "student": student or make_student(tmp_path / "student"),
            "out": tmp_path / out, "lr": 1e-2, "batch_traces": 4, "batch_tokens": 150,
            "lora_rank": 4,
        }  # fmt: skip
        return TrainConfig(**(settings | changes))

    return build


def metrics_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_and_a_merged_student_are_the_same_model(config, tmp_path, tied):
    student = make_student(tmp_path / "base", tied=tied)
    merged, adapter = config("merged", student), config("adapter", student, lora_output="adapter")
    for settings in (merged, adapter):
        train(settings)

    whole = AutoModelForCausalLM.from_pretrained(merged.out / "model")
    base = AutoModelForCausalLM.from_pretrained(student)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    first = logits_of(base)
    loaded = PeftModel.from_pretrained(base, adapter.out / "model")
    torch.testing.assert_close(logits_of(whole), logits_of(loaded), rtol=1e-5, atol=1e-5)
    assert (logits_of(whole) - first).abs().max() > 0.01
    # Nothing but the adapted layers has moved, and the adapter holds nothing of the base.
    after = whole.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if (".self_attn." in n and "_proj" in n) or ".mlp." in n}
    assert not (adapter.out / "model/model.safetensors").exists()
    (checkpoint,) = (adapter.out / "checkpoints").iterdir()
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert all(".lora_" in name for name in state["student"])
    assert len(state["optimizer"]["state"]) == len(state["student"])


@pytest.mark.slow
def test_an_adapter_is_loaded_with_its_own_end_of_generation_but_cannot_be_a_student(config):
    settings = config("run", lora_output="adapter", max_steps=1)
    train(settings)

    model, _ = load_model(str(settings.out / "model"))
    assert model.generation_config.eos_token_id == [0]
    assert "- weights trained: LoRA of rank 4" in (settings.out / "model/README.md").read_text()
    with pytest.raises(ValueError, match="is an adapter, and training below it would be lost"):
        train(config("next", str(settings.out / "model")))


@pytest.mark.slow
def test_checkpointing_and_packing_change_nothing_of_adapters(config):
    plain = config("plain", packing=False)
    other = config("other", packing=True, gradient_checkpointing=True)
    for settings in (plain, other):
        train(settings)

    for one, two in zip(metrics_of(plain), metrics_of(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("target", ["w_proj", "lm_head", "embed_tokens", "proj"])
def test_layers_that_are_not_there_or_that_the_loss_uses_cannot_be_targets(target):
    with pytest.raises(ValueError, match=f"no layer '{target}' .*; there are down_proj, gate_proj"):
        add_adapters(make_model(), Lora(2, 4, ("q_proj", target), seed=0))


def test_named_targets_alone_are_adapted_whatever_else_used_random_numbers():
    adapted = []
    for number in range(2):
        model = make_model()
        torch.manual_seed(number)
        before = torch.get_rng_state()
        add_adapters(model, Lora(2, 4, ("q_proj",), seed=5))
        assert torch.equal(torch.get_rng_state(), before)
        adapted.append({n: p for n, p in model.named_parameters() if p.requires_grad})

    assert len(adapted[0]) == 4
    assert all(".q_proj.lora_" in name for name in adapted[0])
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])


def test_all_weights_are_trained_without_adapters(config):
    settings = config("run", lora_rank=None, max_steps=1)
    train(settings)

    (checkpoint,) = (settings.out / "checkpoints").iterdir()
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["student"].keys() == make_model().state_dict().keys()


def test_frozen_weights_cost_no_product_for_a_gradient_of_their_own():
    whole = FlopFormula.of(make_model()).flops([50], 49)
    model = make_model()
    add_adapters(model, Lora(1, 1, ("all-linear",), seed=0))

    assert 0.6 * whole < FlopFormula.of(model).flops([50], 49) < 0.8 * whole


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own
@pytest.mark.parametrize("family", EXPERTS)
def test_routers_of_experts_are_left_alone_unless_named(family):
    adapted = {}
    for targets in (("all-linear",), ("q_proj",)):
        model = EXPERTS[family]()
        add_adapters(model, Lora(2, 4, targets, 0))
        adapted[targets] = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("experts" in name for name in adapted["all-linear",])
    assert not any(".gate." in name for name in adapted["all-linear",])
    assert all("q_proj" in name for name in adapted["q_proj",])
