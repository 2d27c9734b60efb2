import pytest
import torch
from fakes import make_trace, make_traces
from students import segments_of

from student_train.batch.loss_tokens import Teaching, valid_positions
from student_train.batch.micro_batch import empty_micro_batch, micro_batches
from student_train.batch.packing import LAYOUTS
from student_train.data.tokens import TokenSelection
from teacher_cache.format import TraceInfo

WHOLE = TokenSelection()
HARD = Teaching(hard_labels=True)


def batches_of(
    traces, selection=WHOLE, *, batch_tokens=10_000, loss_reduction="token", layout="flat"
):
    return micro_batches(
        selection.selected(traces),
        batch_tokens=batch_tokens,
        loss_reduction=loss_reduction,
        layout=layout,
    )


@pytest.mark.parametrize(
    ("sections", "first", "end"),
    [
        (("prompt",), 1, 10),  # token 0 has no distribution
        (("cot",), 10, 30),
        (("answer",), 30, 40),
        (("prompt", "cot"), 1, 30),
        (("cot", "answer"), 10, 40),
    ],
)
def test_sections_select_what_they_say(sections, first, end):
    trace = make_trace("t", 40)

    valid = valid_positions(trace, TokenSelection(sections=sections))
    assert valid.tolist() == list(range(first, end))


def test_prompt_and_answer_leave_the_chain_of_thought_out():
    valid = valid_positions(make_trace("t", 40), TokenSelection(sections=("prompt", "answer")))

    assert valid.tolist() == [*range(1, 10), *range(30, 40)]


def test_lead_span_and_sections_meet():
    selection = TokenSelection(lead_span=0.5, sections=("cot", "answer"))

    assert valid_positions(make_trace("t", 40), selection).tolist() == list(range(10, 20))


def test_tokens_without_a_distribution_are_not_valid():
    trace = make_trace("t", 40, without_entries=(5, 39))

    assert set(range(40)) - set(valid_positions(trace, WHOLE).tolist()) == {0, 5, 39}


def test_hard_labels_teach_where_a_response_has_no_distribution():
    trace = make_trace("t", 40, without_entries=(5, 20, 39))  # the response begins at 10
    selection = TokenSelection(sections=("prompt", "answer"))

    assert set(range(40)) - set(valid_positions(trace, WHOLE, teaching=HARD)) == {0, 5}
    (hard,) = micro_batches(
        WHOLE.selected([trace]), batch_tokens=99, loss_reduction="sequence", teaching=HARD
    )
    assert (hard.num_valid, hard.num_hard_labels, hard.num_left_out) == (38, 2, 0)
    torch.testing.assert_close(hard.token_weight, torch.full((38,), 1 / 38))
    without = (hard.targets.k == 0).nonzero()[:, 0]
    assert (hard.hidden_index[without] + 1).tolist() == [20, 39]
    assert hard.targets.target_ids[without].tolist() == trace.token_ids[[20, 39]].tolist()
    assert torch.equal(hard.targets.top_ids[without, 0], hard.targets.target_ids[without])
    (soft,) = batches_of([trace])
    assert (soft.num_valid, soft.num_hard_labels, soft.num_left_out) == (36, 0, 2)
    (answer,) = batches_of([trace], selection)
    assert answer.num_left_out == 1  # the other one was not asked for


@pytest.mark.parametrize(
    ("selection", "num_read"),
    [
        (WHOLE, 40),
        (TokenSelection(lead_span=0.5), 20),
        (TokenSelection(trace_tokens=7), 7),
        (TokenSelection(trace_tokens=700), 40),
        (TokenSelection(sections=("prompt", "cot")), 30),
        (TokenSelection(lead_span=0.5, sections=("answer",)), 1),
    ],
)
def test_no_more_is_read_than_is_trained_on(selection, num_read):
    info = TraceInfo("t", 40, 10, 30, "stop", "")

    assert selection.num_read(info) == num_read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lead_span": 0.0}, "expected a number above 0 and at most 1"),
        ({"lead_span": 1.5}, "expected a number above 0 and at most 1"),
        ({"lead_span": float("nan")}, "expected a number above 0 and at most 1"),
        ({"trace_tokens": 0}, "--trace-tokens: expected a number at least 1, got 0"),
        ({"lead_span": 0.5, "trace_tokens": 5}, "not both"),
        ({"sections": ("cot", "middle")}, "prompt, cot, answer, got 'middle'"),
        ({"sections": ()}, "got none"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenSelection(**settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_point_one_position_before_the_token_and_targets_are_its_own(layout):
    traces = make_traces(9)
    left = list(traces)
    for batch in batches_of(traces, layout=layout):
        n = 0
        for row, first, end in segments_of(batch):
            tokens = batch.input_ids[row, first:end].tolist()
            (trace,) = (t for t in left if tokens[: t.n_total - 1] == t.token_ids[:-1].tolist())
            left.remove(trace)
            assert not any(tokens[trace.n_total - 1 :])  # padding
            for t in range(1, trace.n_total):
                assert divmod(int(batch.hidden_index[n]), batch.input_ids.shape[1]) == (
                    row,
                    first + t - 1,
                )
                own = slice(*trace.entry_offsets[t : t + 2])
                k = int(batch.targets.k[n])
                assert k == trace.k[t]
                assert batch.targets.top_ids[n, :k].tolist() == trace.top_ids[own].tolist()
                assert batch.targets.top_logits[n, :k].tolist() == trace.top_logits[own].tolist()
                assert batch.targets.tail_logit[n] == trace.tail_logit[t]
                assert batch.targets.target_ids[n] == trace.token_ids[t]
                n += 1
        assert n == batch.num_valid
    assert left == []


def test_a_flat_row_says_where_its_traces_begin():
    (batch,) = batches_of([make_trace("long", 30), make_trace("short", 10)])

    assert batch.input_ids.shape == (1, 38)  # the last token of a trace predicts nothing
    assert batch.trace_ends.tolist() == [0, 29, 38]
    assert batch.longest == 29
    assert batch.position_ids.tolist() == [[*range(29), *range(9)]]


def test_a_row_of_one_trace_needs_no_positions():
    for layout in LAYOUTS:
        (batch,) = batches_of([make_trace("only", 30)], layout=layout)
        assert batch.position_ids is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_stay_under_the_cap_and_hold_every_valid_token(layout):
    traces = make_traces(30)
    batches = batches_of(traces, batch_tokens=200, layout=layout)

    assert len(batches) > 3
    assert all(batch.input_ids.numel() <= 200 for batch in batches)
    assert sum(batch.num_valid for batch in batches) == sum(t.n_total - 1 for t in traces)
    assert sum(batch.num_traces for batch in batches) == 30


def test_every_trace_weighs_the_same_when_asked():
    traces = [make_trace("long", 60), make_trace("short", 20)]
    (batch,) = batches_of(traces, loss_reduction="sequence")

    assert batch.token_weight[:59].tolist() == [pytest.approx(1 / 59)] * 59
    assert batch.token_weight[59:].tolist() == [pytest.approx(1 / 19)] * 19
    assert (batches_of(traces)[0].token_weight == 1).all()


def test_traces_without_a_valid_token_are_left_out():
    traces = [make_trace("a", 40), make_trace("b", 8, without_entries=range(8))]
    (batch,) = batches_of(traces)

    assert batch.num_traces == 1
    assert batches_of(traces[1:]) == []


def test_an_empty_micro_batch_has_one_position_and_nothing_to_learn():
    batch = empty_micro_batch().to(torch.device("cpu"))

    assert batch.input_ids.shape == (1, 1)
    assert batch.num_valid == 0
    assert len(batch.targets) == 0
