import pytest
import torch
from fakes import VOCAB_SIZE, make_traces
from students import make_model, make_tokenizer
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

from student_train.batch import micro_batches
from student_train.forward import StudentWithLoss
from student_train.selection import TokenSelection
from student_train.student import head_of, student_fingerprint

SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
CASES = {
    "tied": lambda: make_model(),
    "untied": lambda: make_model(tied=False),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "scaling": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "other names": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_models_own_logits(case):
    torch.manual_seed(0)
    model = CASES[case]().eval()
    traces = make_traces(3)
    (batch,) = micro_batches(traces, TokenSelection(), batch_tokens=1000, normalise="tokens")
    loss, sums = StudentWithLoss(model, head_of(model), ce_weight=1.0)(batch)

    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = logits.flatten(0, 1)[batch.hidden_index]
    expected = torch.nn.functional.cross_entropy(rows, batch.targets.realised_ids, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1].float(), expected, rtol=1e-5, atol=0)


def test_a_head_that_is_more_than_the_config_says_is_refused():
    class Doubled(type(make_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    model = Doubled(make_model().config)

    with pytest.raises(ValueError, match=r"logit_scale=1.0 and softcap=None .*not supported"):
        head_of(model)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(ValueError, match="expected a body and a linear head"):
        head_of(make_model().model)


def test_the_probe_leaves_the_mode_as_it_was():
    model = make_model().train()
    head_of(model)

    assert model.training


def test_a_students_fingerprint_is_that_of_its_weights():
    same = [student_fingerprint(make_model()) for _ in range(2)]

    assert same[0] == same[1]
    assert same[0] != student_fingerprint(make_model(seed=1))


def test_the_fake_tokenizer_reads_what_it_writes():
    tokenizer = make_tokenizer()

    assert tokenizer("<think> 5 </think>")["input_ids"] == [1, 8, 2]
