from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import make_cache, make_trace, make_traces
from students import make_model, make_student

from student_train.batch.micro_batch import micro_batches
from student_train.data.draw import draw_spans
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.model.flops import FlopFormula, compare_flops, count_parameters, counted_flops
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of
from student_train.run.memory import PeakMemory
from student_train.sweep.costs import span_costs
from teacher_cache.format import open_cache
from teacher_cache.transform.truncate import truncate_cache

TRACES = [make_trace(f"t{n}", 40, seed=n) for n in range(3)]


@pytest.mark.parametrize("selection", [TokenSelection(), TokenSelection(0.5, None, ("cot",))])
def test_the_formula_is_pytorchs_count_but_for_the_masked_half_of_attention(selection):
    model = make_model(attn_implementation="eager")
    formula = FlopFormula.of(model)
    (batch,) = micro_batches(
        selection.selected(TRACES), batch_tokens=10_000, loss_reduction="token"
    )
    counted = counted_flops(StudentWithLoss(model, head_of(model)), batch)
    masked = 6 * formula.attention_width * sum(n * n for n in batch.num_positions)

    assert counted == formula.flops(batch.num_positions, batch.num_valid) + masked
    assert all(parameter.grad is None for parameter in model.parameters())


def test_experts_count_by_the_share_that_a_token_is_sent_to():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    def weights(num_experts):
        config = Qwen3MoeConfig(
            vocab_size=41, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            num_experts=num_experts, num_experts_per_tok=2,
        )  # fmt: skip
        return FlopFormula.of(Qwen3MoeForCausalLM(config)).body_weights

    router = 2 * 32  # layers x hidden size, per expert
    assert weights(8) - weights(4) == 4 * router


def test_flops_are_compared_for_every_span(tmp_path):
    cache = open_cache(make_cache(tmp_path / "cache", TRACES))
    student = make_student(tmp_path / "student")
    half, full = compare_flops(student, cache, [TokenSelection(0.5), TokenSelection()])

    assert (half.num_positions, full.num_positions) == (19, 39)
    assert half.by_formula < 0.5 * full.by_formula
    assert 1 < full.counted / full.by_formula < 1.2
    assert count_parameters(student) == sum(p.numel() for p in make_model().parameters())


def test_a_span_costs_the_bands_that_hold_it(tmp_path):
    (source,) = open_data(
        [make_cache(tmp_path / "cache", make_traces(12, lengths=(60, 200)))]
    ).sources
    cache = source.cache
    full = span_costs(draw_spans(source, TokenSelection(), seed=0))
    half = span_costs(draw_spans(source, TokenSelection(0.5), seed=0))

    assert full["cot_share"] == 1.0
    assert full["tokens_saved"] == 0
    assert full["cache_bytes"] <= sum(shard.size_bytes for shard in cache.shards)
    assert half["tokens_saved"] + half["num_positions"] == full["num_captured"]
    # The chain of thought is the second and third quarter.
    assert half["cot_share"] == pytest.approx(0.5, abs=0.02)
    truncate_cache(cache, str(tmp_path / "half"), lead_span=0.5)
    smaller = sum(s.size_bytes for s in open_cache(str(tmp_path / "half")).shards)
    assert half["cache_bytes"] < full["cache_bytes"]
    assert smaller < sum(shard.size_bytes for shard in cache.shards)


def test_labels_of_the_last_part_alone_still_cost_the_whole_trace(tmp_path):
    (source,) = open_data([make_cache(tmp_path / "cache", make_traces(5))]).sources
    last = span_costs(draw_spans(source, TokenSelection(0.25, loss_on="last"), seed=0))
    full = span_costs(draw_spans(source, TokenSelection(), seed=0))

    assert last["num_positions"] == full["num_positions"]
    assert last["trace_share"] == pytest.approx(0.25, abs=0.02)
    assert last["cot_share"] < 0.05


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_memory_that_was_held_and_given_back_is_remembered():
    memory = PeakMemory(torch.device("cpu"))
    held = np.ones(200 * 2**20, np.uint8)
    del held

    assert 190 * 2**20 < memory.peak_bytes < 400 * 2**20
    assert PeakMemory(torch.device("cpu")).peak_bytes < 100 * 2**20


@pytest.mark.slow
def test_traces_that_are_held_out_cost_their_capture_and_no_training(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(40))
    (all_of_it,) = open_data([path]).sources
    (half,) = open_data([path], heldout_share=0.5).sources
    costs = [
        span_costs(draw_spans(source, TokenSelection(), seed=0)) for source in (all_of_it, half)
    ]

    assert costs[0]["num_captured"] == costs[1]["num_captured"] == costs[0]["num_positions"]
    assert costs[1]["num_positions"] == sum(info.n_total for info in half.train_infos())
