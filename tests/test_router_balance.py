"""The routers' auxiliary loss, against that of transformers."""

import json

import pytest
import torch
from fakes import make_cache, make_trace, make_traces
from students import EXPERTS, make_model, make_student, make_tokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss, sum_names
from student_train.model.load import head_of
from student_train.run.config import TrainConfig
from student_train.run.loop import train

LENGTHS = {"alone": (40, 39, 38), "packed": (41, 21, 20)}  # three rows, and two; one is padded


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("family", EXPERTS)
def test_the_loss_grows_by_what_the_model_would_add_to_its_own(family, layout):
    torch.manual_seed(0)
    model = EXPERTS[family]()
    batch, *_ = micro_batches(
        TokenSelection().selected(make_trace(f"t{n}", n) for n in LENGTHS[layout]),
        batch_tokens=130, loss_reduction="sequence", layout=layout,
    )  # fmt: skip
    is_real = torch.arange(batch.input_ids.shape[1]) < batch.row_lengths[:, None]
    assert not is_real.all()
    head = head_of(model)
    without, _ = StudentWithLoss(model, head)(batch)
    found, sums = StudentWithLoss(model, head, router_aux_loss_coef=0.25)(batch)

    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits = model.base_model(
        input_ids=batch.input_ids, output_router_logits=True, use_cache=False, **positions
    ).router_logits
    expected = load_balancing_loss_func(logits, 4, 2, is_real)
    named = dict(zip(sum_names(1, balances_experts=True), sums.tolist(), strict=True))
    assert named["router_aux_loss"] == pytest.approx(batch.num_valid * expected.item(), rel=1e-5)
    added = 0.25 * batch.token_weight.sum() * expected
    torch.testing.assert_close(found - without, added, rtol=1e-4, atol=0)
    routers = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    found_grads = torch.autograd.grad(found - without, routers)
    for left, right in zip(found_grads, torch.autograd.grad(added, routers), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_balances_the_experts_and_says_how_they_are(tmp_path):
    torch.manual_seed(0)
    EXPERTS["mixtral"]().save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    config = TrainConfig(
        cache=(make_cache(tmp_path / "cache", make_traces(8)),), student=str(tmp_path / "student"),
        out=tmp_path / "run", router_aux_loss_coef=1.0, lr=1e-2, batch_traces=8, epochs=10,
        schedule="constant", warmup=0.0, gradient_checkpointing=True, tracker="none",
    )  # fmt: skip
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(
        0.5 * first["kl"] + 0.5 * first["ce"] + first["router_aux_loss"], rel=1e-5
    )
    # 2 of 4 experts work on each token: 2 if all are used alike.
    assert abs(last["router_aux_loss"] - 2) < 0.5 * abs(first["router_aux_loss"] - 2)


def test_a_student_without_experts_has_nothing_to_balance(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no routers with an auxiliary loss"):
        StudentWithLoss(model, head_of(model), router_aux_loss_coef=0.1)
    config = TrainConfig(
        cache=(make_cache(tmp_path / "cache", make_traces(4)),), out=tmp_path / "run",
        student=make_student(tmp_path / "student"), router_aux_loss_coef=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="--router-aux-loss-coef: Qwen3ForCausalLM"):
        train(config)
