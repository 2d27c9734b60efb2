"""Precision of products, frozen weights and saved students, decided before a run begins."""

import pytest
import torch
from fakes import make_cache, make_traces
from students import make_model, make_student
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_train.batch.micro_batch import one_micro_batch
from student_train.data.tokens import TokenSelection
from student_train.model.adapters import add_adapters
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of
from student_train.model.lora import Lora
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from student_train.run.precision import halve_frozen_layers, with_precision


def config_of(**settings):
    return TrainConfig(**{"cache": ("c",), "student": "s", "out": "o"} | settings)


@pytest.mark.parametrize(
    ("asked", "accelerate", "found", "said"),
    [
        (None, "no", "float32", ""),  # on a CPU
        (None, "bf16", "bfloat16", ""),
        ("float32", "bf16", "float32", "accelerate is configured for bf16"),
        ("bfloat16", "fp16", "bfloat16", "accelerate is configured for fp16"),
        ("float32", "no", "float32", ""),
    ],
)
def test_precision_is_asked_for_or_configured(monkeypatch, caplog, asked, accelerate, found, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", accelerate)
    assert with_precision(config_of(dtype=asked)).dtype == found
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_a_gpu_multiplies_in_bfloat16_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert with_precision(config_of()).dtype == "bfloat16"
    assert with_precision(config_of(dtype="float32")).dtype == "float32"


def test_a_precision_of_accelerate_that_no_run_has_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="'fp8', which no run has"):
        with_precision(config_of())


def test_frozen_layers_in_bfloat16_change_no_product():
    batch = one_micro_batch(TokenSelection().selected(make_traces(3)))
    found = []
    for halves in (False, True):
        model = make_model(tied=False)
        head = head_of(model)
        add_adapters(model, Lora(4, 8, ("all-linear",), 0))
        if halves:
            halve_frozen_layers(model)
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.get_input_embeddings().weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = StudentWithLoss(model, head)(batch)
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(weight.dtype == torch.float32 for weight in trained.values())
        found.append((loss.item(), {name: weight.grad for name, weight in trained.items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


@pytest.mark.slow
def test_a_student_is_saved_as_it_came_unless_told_otherwise(tmp_path):
    student = make_student(tmp_path / "student")
    AutoModelForCausalLM.from_pretrained(student).bfloat16().save_pretrained(student)
    cache = make_cache(tmp_path / "cache", make_traces(8))
    for asked, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / str(asked)
        train(config_of(cache=(cache,), student=student, out=out, max_steps=1, save_dtype=asked))
        assert AutoConfig.from_pretrained(out / "model").dtype == expected
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
        assert {weight.dtype for weight in model.parameters()} == {expected}


def test_a_weight_too_large_for_the_dtype_is_named_and_a_wider_one_writes_the_student(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(make_student(tmp_path / "other")).save_pretrained(
        tmp_path / "student"
    )
    cache = make_cache(tmp_path / "cache", make_traces(4))
    asked = {"cache": (cache,), "student": str(tmp_path / "student"), "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"--save-dtype: .*embed.* up to 1e\+05, too large for"):
        train(config_of(**asked, max_steps=1, save_dtype="float16"))
    assert not (tmp_path / "run/model").exists()
    assert train(config_of(**asked, max_steps=1, save_dtype="float32")).num_steps == 1
