import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import VOCAB_SIZE, make_cache, make_trace, make_traces
from reference import trace_losses
from students import FAMILIES, SHAPE, make_family, make_model, make_tokenizer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from student_train.batch.loss_tokens import Teaching
from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from student_train.losses import Objective
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of
from student_train.run.config import TrainConfig
from student_train.run.loop import train

HEADS = {
    "tied": lambda: make_model(),
    "untied": lambda: make_model(tied=False),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "scaling": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "other names": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_models_own_logits(head):
    torch.manual_seed(0)
    model = HEADS[head]().eval()
    (batch,) = micro_batches(
        TokenSelection().selected([make_trace("t", 60)]), batch_tokens=1000, loss_reduction="token"
    )
    loss, sums = StudentWithLoss(model, head_of(model), Objective(ce_weight=1.0))(batch)

    rows = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.hidden_index]
    expected = torch.nn.functional.cross_entropy(
        rows, batch.targets.target_ids.long(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1].float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("matched_chunks_at", [None, 100.0])
def test_a_factor_scales_the_loss_and_its_gradient_and_no_figure(matched_chunks_at):
    model = make_model().eval()
    trace = replace(make_trace("t", 30), chunk_logprob=np.full(30, -1.0, np.float32))
    teaching = Teaching(hard_labels=True, chunks=matched_chunks_at is not None)
    (batch,) = micro_batches(
        TokenSelection().selected([trace]), batch_tokens=1000, loss_reduction="token",
        teaching=teaching,
    )  # fmt: skip
    student = StudentWithLoss(model, head_of(model), matched_chunks_at=matched_chunks_at)
    found = []
    for factor in (1.0, 0.25):
        loss, sums = student(batch, factor)
        (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
        found.append((loss / factor, sums, gradient / factor))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_steps_loss_and_gradient_are_those_of_the_dense_definition(family, tmp_path):
    model = make_family(family)
    model.save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    traces = make_traces(7, lengths=(9, 40))
    config = TrainConfig(
        cache=(make_cache(tmp_path / "cache", traces),), student=str(tmp_path / "student"),
        out=tmp_path / "run", loss_reduction="sequence", batch_traces=7, batch_tokens=150,
        packing=True, max_steps=1,
    )  # fmt: skip
    train(config)
    found = json.loads((tmp_path / "run/metrics.jsonl").read_text())

    # In float64, every trace by itself, all logits of the model's own forward.
    model.double().eval()
    if family == "qwen3 moe":  # its grouped products know no float64
        model.set_experts_implementation("eager")
    per_trace = []
    for trace in traces:
        ids = torch.from_numpy(trace.token_ids).long()
        per_trace.append(trace_losses(model(input_ids=ids[None]).logits[0], trace, 0.5))
    expected = torch.stack([losses.mean() for losses in per_trace]).mean()
    expected.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
@pytest.mark.parametrize(
    ("family", "changes"), [("qwen3", {}), ("gemma3", {"gradient_checkpointing": True})]
)
def test_a_compiled_student_trains_as_it_would_without(family, changes, tmp_path):
    make_family(family).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    cache = make_cache(tmp_path / "cache", make_traces(12, lengths=(9, 40)))
    curves = []
    for name in ("plain", "compiled"):
        config = TrainConfig(
            cache=(cache,), student=str(tmp_path / "student"), out=tmp_path / name, lr=1e-3,
            batch_traces=4, batch_tokens=100, packing=True, compile=name == "compiled", **changes,
        )  # fmt: skip
        train(config)
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
        curves.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
        assert (config.out / "model/model.safetensors").exists()

    assert len(curves[0]) == 3
    for plain, compiled in zip(*curves, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3)
