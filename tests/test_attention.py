from itertools import pairwise

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from fakes import make_traces
from students import FAMILIES, SHAPE, make_family, make_tokenizer, segments_of
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import student_train.model.attention as attention
from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.attention import keeps_traces_apart, prepare_attention
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of, load_model

TRACES = make_traces(12, lengths=(9, 40))
MIXING = {
    "recurrence": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=41, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "convolution": lambda: Lfm2ForCausalLM(
        Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    ),
    "chunks": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SHAPE, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64,
            layer_types=["chunked_attention", "full_attention"],
        )
    ),
    "positions of its own": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=41, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=32, pad_token_id=None, dropout=0.0,
        )
    ),
}  # fmt: skip


def outcome(model, layout, traces=TRACES, *, head=None):
    """Hidden states by all tokens up to theirs, the loss, and its gradients."""
    student = StudentWithLoss(model, head or head_of(model))
    hidden, losses, seen = {}, [], []
    hook = model.base_model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.detach())
    )
    model.zero_grad()
    batches = batches_of(traces, layout)
    for batch in batches:
        loss, _ = student(batch)
        loss.backward()
        losses.append(loss.item())
        for row, first, end in segments_of(batch):
            tokens = tuple(batch.input_ids[row, first:end].tolist())
            for column in range(first, end):
                hidden[tokens[: column - first + 1]] = seen[-1][row, column]
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden, sum(losses), gradients, batches


def batches_of(traces, layout):
    return micro_batches(
        TokenSelection().selected(traces), batch_tokens=400, loss_reduction="token", layout=layout
    )


def assert_same(one, other):
    """Within what float32 rounds; hidden states and gradients are of the order of one."""
    shared = one[0].keys() & other[0].keys()  # padding is in one of them only
    assert len(shared) > 100
    for prefix in shared:
        torch.testing.assert_close(one[0][prefix], other[0][prefix], rtol=1e-4, atol=2e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, other[2][name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_traces_come_out_as_each_alone(family):
    model = make_family(family)
    assert keeps_traces_apart(model)
    assert prepare_attention(model, None, packing=True, half_precision=False) == "packed"
    packed = outcome(model, "packed")
    alone = [outcome(model, "alone", [trace]) for trace in TRACES]

    assert any(batch.position_ids is not None for batch in packed[3])
    assert any(len(batch.input_ids) > 1 for batch in packed[3])
    hidden = {prefix: state for part in alone for prefix, state in part[0].items()}
    gradients = {name: sum(part[2][name] for part in alone) for name in alone[0][2]}
    assert_same(packed, (hidden, sum(part[1] for part in alone), gradients))


@pytest.mark.parametrize("kind", MIXING)
def test_models_that_would_mix_the_traces_of_a_row_are_not_packed(kind):
    torch.manual_seed(0)
    model = MIXING[kind]().train()

    assert not keeps_traces_apart(model)
    assert model.training


@pytest.mark.parametrize("kind", ["recurrence", "positions of its own"])
def test_padding_at_the_end_changes_nothing_for_them(kind):
    torch.manual_seed(0)
    model = MIXING[kind]()
    traces = make_traces(6, lengths=(39, 41))
    padded = outcome(model, "alone", traces)
    alone = [outcome(model, "alone", [trace]) for trace in traces]

    assert len(padded[3]) == 1
    assert len({trace.n_total for trace in traces}) > 1
    assert padded[1] == pytest.approx(sum(part[1] for part in alone), rel=1e-5)


def test_nothing_is_packed_when_packing_is_off():
    assert prepare_attention(make_family("qwen3"), None, packing=False, half_precision=False) == (
        "alone"
    )


def test_a_model_that_forgets_the_positions_is_found_out():
    model = make_family("qwen3")
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **rest: forward(**rest)

    assert not keeps_traces_apart(model)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
           causal, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """What FlashAttention computes of traces that lie one behind the other, by its definition."""
    ends = cu_seqlens_q.tolist()
    assert cu_seqlens_k.tolist() == ends
    assert max_seqlen_q == max(b - a for a, b in pairwise(ends))
    assert causal
    parts = []
    for a, b in pairwise(ends):
        repeats = q.shape[1] // k.shape[1]
        keys, values = (t[a:b].repeat_interleave(repeats, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (back >= 0) & ((window_size[0] < 0) | (back <= window_size[0]))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


@pytest.fixture
def flash_stand_in(monkeypatch):
    """The functions of the package that transformers would load, on the CPU."""
    functions = (None, varlen, None, None, None)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    original = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self, name, *args, **kwargs):
        return name if name == "flash_attention_2" else original(self, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_gets_one_row_and_the_ends_of_its_traces(family, flash_stand_in):
    model = make_family(family)
    head = head_of(model)
    expected = outcome(model, "alone", head=head)
    layout = prepare_attention(model, None, packing=True, half_precision=True)

    assert layout == "flat"
    flat = outcome(model, layout, head=head)
    assert [len(batch.input_ids) for batch in flat[3]] == [1] * len(flat[3])
    assert_same(flat, expected)


def test_flash_attention_in_full_precision_is_refused():
    with pytest.raises(ValueError, match="needs half precision: add --dtype bfloat16"):
        prepare_attention(
            make_family("qwen3"), "flash_attention_2", packing=True, half_precision=False
        )


def test_a_backend_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(ValueError, match="attention 'nonsense' cannot be used here: ") as error:
        prepare_attention(make_family("qwen3"), "nonsense", packing=True, half_precision=False)
    assert "\n" not in str(error.value)


def test_capped_scores_are_not_left_to_a_backend_that_ignores_the_cap(tmp_path):
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, attn_logit_softcapping=2.0))
    capped.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))

    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="leaves out the cap"):
        prepare_attention(model, "sdpa", packing=True, half_precision=False)
