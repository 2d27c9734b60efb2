from dataclasses import replace

import numpy as np
import pytest
from fakes import make_trace

from student_train.batch.loss_tokens import valid_positions
from student_train.data.tokens import LossDropout, TokenSelection

TRACE = make_trace("t", 40)  # prompt to 10, chain of thought to 30, answer to 40


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_on": "lead", "lead_span": 0.25}, [*range(1, 10)]),
        ({"loss_on": "middle", "lead_span": 0.25}, [*range(15, 25)]),
        ({"loss_on": "last", "lead_span": 0.25}, [*range(30, 40)]),
        ({"loss_on": "last", "trace_tokens": 3}, [37, 38, 39]),
        ({"loss_on": "last", "lead_span": 0.5, "sections": ("cot",)}, [*range(20, 30)]),
        ({"lead_span_of": "reasoning"}, [*range(1, 30)]),
        ({"lead_span_of": "reasoning", "lead_span": 0.5}, [*range(1, 15)]),
        ({"lead_span_of": "reasoning", "trace_tokens": 35}, [*range(1, 30)]),
        ({"lead_span_of": "reasoning", "loss_on": "last", "lead_span": 0.5}, [*range(15, 30)]),
        ({"lead_span_of": "reasoning", "sections": ("answer",)}, []),
    ],
)
def test_the_supervised_part(settings, expected):
    assert valid_positions(TRACE, TokenSelection(**settings)).tolist() == expected


@pytest.mark.parametrize("sections", [("prompt", "cot", "answer"), ("cot",)])
def test_the_lead_middle_and_last_thirds_make_up_the_whole(sections):
    trace = make_trace("t", 60)
    whole = valid_positions(trace, TokenSelection(sections=sections)).tolist()
    share = 0.34
    parts = [
        valid_positions(trace, TokenSelection(share, None, sections, part)).tolist()
        for part in ("lead", "middle", "last")
    ]
    assert sorted({token for part in parts for token in part}) == whole


def test_a_trace_without_a_chain_of_thought_has_no_reasoning_to_train_on():
    without = replace(TRACE, cot_start=0, answer_start=0)
    assert TokenSelection(lead_span_of="reasoning").ranges(without) == []


def test_a_selection_says_what_it_is():
    assert str(TokenSelection(0.5)) == "the first 0.5 of every trace, sections prompt, cot, answer"
    assert str(TokenSelection(None, 9, ("cot",), "last", "reasoning")) == (
        "the last 9 tokens of every trace before its answer, sections cot"
    )
    assert str(TokenSelection(lead_span_of="reasoning", sections=("cot",))) == (
        "whole traces before the answer, sections cot"
    )


@pytest.mark.parametrize("settings", [{"loss_on": "first"}, {"lead_span_of": "cot"}])
def test_unknown_parts_and_wholes_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected "):
        TokenSelection(**settings)


@pytest.mark.parametrize(("share", "num_masked"), [(0.0, 0), (0.3, 9), (0.5, 14), (0.99, 29)])
def test_a_random_mask_leaves_out_its_share_after_truncation(share, num_masked):
    selection = TokenSelection(trace_tokens=30)
    valid = valid_positions(TRACE, selection)
    left = valid_positions(TRACE, selection, LossDropout(share, seed=1, epoch=0))

    assert len(valid) - len(left) == num_masked
    assert set(left) <= set(valid)
    assert (np.diff(left) > 0).all()


def test_a_random_mask_is_drawn_anew_by_seed_epoch_and_trace_and_by_nothing_else():
    def drawn(seed=1, epoch=0, trace_id="t"):
        return LossDropout(0.5, seed, epoch).kept(trace_id, 40).tolist()

    assert drawn() == drawn()
    assert len({tuple(drawn(**c)) for c in ({}, {"seed": 2}, {"epoch": 1}, {"trace_id": "u"})}) == 4


def test_a_random_mask_spares_no_place():
    kept = sum(LossDropout(0.5, 0, epoch).kept("t", 20).astype(int) for epoch in range(400))

    assert kept.sum() == 400 * 10
    assert 150 < kept.min() <= kept.max() < 250
