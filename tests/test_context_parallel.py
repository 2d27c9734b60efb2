"""Parts of traces for a team of processes; that a team equals one process: test_sharding.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import make_trace, make_traces
from students import make_family, make_model, segments_of
from test_forward import HEADS

from student_train.batch.loss_tokens import Teaching
from student_train.batch.micro_batch import RowLengths, empty_micro_batch, micro_batches
from student_train.batch.sequence_parts import WHOLE_SEQUENCE, SequencePart
from student_train.data.tokens import TokenSelection
from student_train.model.context_parallel import check_sharing, share_sequences
from student_train.run.config import TrainConfig
from student_train.run.teams import make_teams

COUNTS = ("num_traces", "num_valid", "num_absent", "num_distributions", "num_hard_labels",
          "num_left_out")  # fmt: skip


def a_batch(layout="alone"):
    traces = [*make_traces(5, lengths=(50, 53)), make_trace("hard", 51, without_entries=(9, 20))]
    (batch,) = micro_batches(
        TokenSelection(0.9).selected(traces), batch_tokens=2000, loss_reduction="sequence",
        teaching=Teaching(hard_labels=True), layout=layout,
    )  # fmt: skip
    return batch


@pytest.mark.parametrize("layout", ["alone", "flat"])
@pytest.mark.parametrize("num_parts", [2, 3, 4, 8])
def test_parts_together_hold_every_token_and_what_teaches_it_once(num_parts, layout):
    whole = a_batch(layout)
    parts = [SequencePart(member, num_parts).of(whole) for member in range(num_parts)]
    width = whole.input_ids.shape[1]

    assert len({part.input_ids.shape for part in parts}) == 1  # processes exchange equal shares
    joined = torch.cat([part.input_ids for part in parts], dim=1)
    assert torch.equal(joined[:, :width], whole.input_ids)
    assert not joined[:, width:].any()
    positions = torch.cat([part.position_ids for part in parts], dim=1)
    for row, first, end in segments_of(whole):
        assert positions[row, first:end].tolist() == list(range(end - first))
    assert positions.max() == whole.longest - 1  # padding asks for none that a student may lack
    for part in parts:  # attention gets whole rows
        lengths = part.lengths_in_row.lengths if layout == "flat" else (joined.shape[1],)
        assert sum(lengths) == joined.shape[1]
        if layout == "flat":
            assert np.cumsum(lengths[:-1]).tolist() == whole.trace_ends[1:-1].tolist()
    assert torch.equal(sum(part.row_lengths for part in parts), whole.row_lengths)
    for name in COUNTS:
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name), name

    def taught(batch, first_column):
        width, position = batch.input_ids.shape[1], batch.predicting_positions()
        row, column = batch.hidden_index // width, batch.hidden_index % width + first_column
        for n in range(batch.num_valid):
            targets = batch.targets.select(slice(n, n + 1))
            k = max(1, int(targets.k))
            yield (
                int(row[n]), int(column[n]), int(position[n]),
                int(targets.target_ids), float(targets.tail_logit),
                targets.top_ids[0, :k].tolist(), targets.top_logits[0, :k].tolist(),
                float(batch.token_weight[n]),
            )  # fmt: skip

    own_width = parts[0].input_ids.shape[1]
    found = [each for n, part in enumerate(parts) for each in taught(part, n * own_width)]
    assert sorted(found) == sorted(taught(whole, 0))


def test_one_process_has_all_of_a_batch_and_nothing_has_parts_too():
    batch = a_batch()
    assert WHOLE_SEQUENCE.of(batch) is batch
    part = SequencePart(1, 2).of(empty_micro_batch())
    assert (part.input_ids.shape, part.num_valid, part.num_traces) == ((1, 1), 0, 0)


@pytest.mark.parametrize(
    ("make", "num_parts", "message"),
    [
        (lambda: make_model(num_attention_heads=6, num_key_value_heads=2), 4,
         "6 attention heads and 2 key-value heads, .* use 2 or 6$"),
        (lambda: make_model(num_attention_heads=12, num_key_value_heads=4), 6, "use 2 or 4 or 12$"),
        (lambda: make_family("gemma2"), 2, "sliding windows"),
        (lambda: make_family("gemma3"), 2, "sliding windows"),
        (lambda: make_family("mistral"), 2, "sliding windows"),
        (HEADS["softcap"], 2, "sliding windows"),
    ],
)  # fmt: skip
def test_a_student_that_cannot_be_shared_is_refused_with_the_reason(make, num_parts, message):
    with pytest.raises(ValueError, match=message):
        check_sharing(make(), num_parts)


@pytest.mark.parametrize("make", [make_model, HEADS["scale"], HEADS["scaling"]])
def test_a_student_that_can_be_shared_stays_as_it_was(make):
    model = make()
    before = model.config._attn_implementation
    assert check_sharing(model, 2)  # and traces may share rows
    assert model.config._attn_implementation == before


def test_traces_get_rows_of_their_own_where_a_student_does_not_pass_their_lengths_on(monkeypatch):
    model = make_model()
    forward = type(model.model).forward

    def forgetful(*args, lengths_in_row=None, **others):
        return forward(*args, **others)

    monkeypatch.setattr(type(model.model), "forward", forgetful)
    assert not check_sharing(model, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
def test_layers_are_compiled_once_whatever_traces_share_a_row():
    """More rows than torch.compile would make code for before it gives up."""
    torch._dynamo.reset()
    model, plain = (make_model(num_hidden_layers=1) for _ in range(2))
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    for each in (model, plain):
        share_sequences(each, None)
    model.model.layers[0].compile(dynamic=True, backend=backend)
    num_compiled = []
    for lengths in [(9,), *((3,) * n for n in range(2, 12))]:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        arguments = {"input_ids": positions, "position_ids": positions, "use_cache": False,
                     "lengths_in_row": RowLengths(lengths)}  # fmt: skip
        found, expected = (each.model(**arguments).last_hidden_state for each in (model, plain))
        torch.testing.assert_close(found, expected)
        num_compiled.append(len(compiled))
    assert num_compiled == [num_compiled[0]] * len(num_compiled)


def test_a_student_whose_attention_does_more_is_found_by_its_outputs():
    model = make_model()
    for layer in model.model.layers:  # as if a family let tokens see those after them
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="does more with its tokens than causal attention"):
        check_sharing(model, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "eager"}, "--attention: .* it has an attention of its own"),
        ({"match": "chunks"}, "--match chunks: .* a chunk may lie in two parts"),
        ({"live_teacher": "t"}, "--live-teacher: .* it reads whole traces"),
        ({"router_aux_loss_coef": 0.1}, "--router-aux-loss-coef: .* experts are counted in whole"),
    ],
)
def test_what_needs_whole_traces_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(cache=("c",), student="s", out=tmp_path, context_parallel=2, **change)


def test_processes_that_make_no_whole_teams_are_refused():
    accelerator = SimpleNamespace(process_index=0, num_processes=6)
    with pytest.raises(ValueError, match="expected a multiple of 4 processes, got 6"):
        make_teams(accelerator, 4)
