"""Memory predicted on shapes alone, against what a model really keeps."""

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes import make_cache, make_traces
from students import make_family, make_model, make_student
from transformers import Qwen3Config

from student_train.cli.group import cli
from student_train.run.config import TrainConfig
from student_train.run.memory_estimate import counted_activations, estimate

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_memory


def kept_by(model, num_tokens, *, is_half):
    """Bytes that autograd keeps of a real forward pass, weights and their copies left out."""
    body = model.base_model
    shapes = {tuple(p.shape) for p in body.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept, alive = {}, []

    def note(tensor):
        alive.append(tensor)
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
    ):
        body(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("is_half", [False, True])
def test_what_is_counted_on_shapes_is_what_a_model_keeps(is_half):
    model = make_model(num_hidden_layers=2)
    counted = counted_activations(model.config, 2, 64, is_half=is_half)
    # Fake attention copies its output once more; never too little.
    assert 1.0 <= counted / kept_by(model, 64, is_half=is_half) <= 1.15


def config_of(**changes):
    settings = {"cache": ("c",), "student": "s", "out": "o", "dtype": "bfloat16"}
    return TrainConfig(**(settings | changes))


@pytest.mark.slow
def test_an_estimate_counts_every_layer_and_every_weight():
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 5}
    shape = make_model(**wide, tied=False).config
    found = estimate(shape, config_of(), num_tokens=96)
    whole = counted_activations(shape, 5, 96, is_half=True)
    assert found.activations == pytest.approx(whole, rel=0.03)
    num_weights = sum(p.numel() for p in make_model(**wide, tied=False).parameters())
    assert found.gradients == 4 * num_weights
    assert found.optimizer == 8 * num_weights
    lora = config_of(lora_rank=4)
    adapted = estimate(shape, lora, num_tokens=96).activations
    whole = counted_activations(shape, 5, 96, is_half=True, lora=lora.lora)
    assert adapted == pytest.approx(whole, rel=0.03)
    assert adapted < found.activations  # inputs of frozen layers are not kept


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_estimate_is_what_is_alive_at_once_in_a_step(tied):
    shape = Qwen3Config(
        vocab_size=20_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=tied,
    )  # fmt: skip
    config = bench_memory.config_of({})
    predicted = estimate(shape, config, num_tokens=4096, is_cuda=False).total
    assert predicted == pytest.approx(bench_memory.counted_peak(shape, config, 4096), rel=0.1)


@pytest.mark.slow
def test_what_shrinks_memory_shrinks_the_estimate():
    shape = make_model(num_hidden_layers=6).config
    usual = estimate(shape, config_of(), num_tokens=512)
    assert estimate(shape, config_of(), num_tokens=256).activations < 0.6 * usual.activations
    again = estimate(shape, config_of(gradient_checkpointing=True), num_tokens=512)
    assert again.activations < 0.5 * usual.activations
    split = estimate(shape, config_of(sharding="full"), num_tokens=512, num_processes=4)
    assert split.optimizer == pytest.approx(usual.optimizer / 4, rel=0.01)
    lora = estimate(shape, config_of(lora_rank=2), num_tokens=512)
    assert lora.optimizer < 0.3 * usual.optimizer


def test_experts_are_said_to_be_not_predicted():
    with pytest.raises(ValueError, match="mixture of experts"):
        estimate(make_family("qwen3 moe").config, config_of(), num_tokens=64)


def test_the_command_prints_one_line_and_writes_nothing(tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(4))
    student = make_student(tmp_path / "student")
    out = tmp_path / "run"
    found = CliRunner().invoke(
        cli,
        ["run", "--cache", cache, "--student", student, "--out", str(out), "--estimate"],
    )
    assert found.exit_code == 0, found.output
    assert "GiB per device: weights" in found.stdout
    assert "To shrink it: lower --batch-tokens" in found.stdout
    assert not out.exists()
