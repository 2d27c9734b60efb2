import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import VOCAB_SIZE, make_cache, make_trace, make_traces
from reference import trace_losses
from students import make_model, make_student

from student_train.batch.torch_dataset import DistillationDataset
from student_train.batch.vocabulary import within_vocabulary
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import CacheMismatchError

TEACHER_IDS = 96  # of a teacher with padding above the tokens that it shares with the student


def of_padded_teacher(trace):
    """The same trace, with a third of what was kept in the padding: also likeliest ids."""
    realised = np.repeat(trace.token_ids, trace.k) == trace.top_ids
    moved = (trace.top_ids % 3 == 0) & ~realised
    return replace(trace, top_ids=np.where(moved, trace.top_ids + 50, trace.top_ids).astype("i4"))


def test_the_mass_of_absent_ids_joins_the_tail_and_nothing_else_changes():
    trace = of_padded_teacher(make_trace("t", 60))
    fitted = within_vocabulary(trace, VOCAB_SIZE)
    fitted.validate()
    held = trace.top_ids < VOCAB_SIZE
    token, probs = trace.token_of_entry, np.exp(trace.top_logprobs)
    lost = np.bincount(token, weights=probs * ~held, minlength=60)

    assert 0 < (lost > 0).sum() < 60
    assert (lost > 0.3).any()
    np.testing.assert_array_equal(fitted.top_ids, trace.top_ids[held])
    found = np.exp(fitted.top_logprobs)
    np.testing.assert_allclose(found, probs[held], rtol=1e-5)
    has_entries = trace.k > 0
    np.testing.assert_allclose(
        fitted.tail[has_entries], (trace.tail + lost)[has_entries], rtol=1e-5
    )
    np.testing.assert_array_equal(fitted.tail_logit[lost == 0], trace.tail_logit[lost == 0])


def test_a_trace_with_ids_that_the_student_has_stays_as_it_is():
    trace = make_trace("t", 60)

    assert within_vocabulary(trace, VOCAB_SIZE) is trace


def test_a_dataset_for_other_trainers_can_be_told_of_the_students_ids(tmp_path):
    cache = make_cache(
        tmp_path, [of_padded_teacher(trace) for trace in make_traces(3)], vocab_size=TEACHER_IDS
    )
    data, settings = open_data((cache,)), {"batch_traces": 3}
    (whole,) = DistillationDataset(data, TokenSelection(), **settings)
    (fitted,) = DistillationDataset(data, TokenSelection(), **settings, num_ids=VOCAB_SIZE)

    assert whole["batch"].targets.top_ids.max() >= VOCAB_SIZE
    assert fitted["batch"].targets.top_ids.max() < VOCAB_SIZE
    assert fitted["batch"].num_absent > 0


@pytest.mark.parametrize("place", [0, 7])
def test_a_token_that_the_student_lacks_is_refused(place):
    trace = make_trace("t", 20, without_entries=(place,))
    trace.token_ids[place] = 93

    with pytest.raises(CacheMismatchError, match=f"trace 't': its token {place} has the id 93"):
        within_vocabulary(trace, VOCAB_SIZE)


@pytest.mark.parametrize(("teacher_ids", "student_ids"), [(TEACHER_IDS, 64), (VOCAB_SIZE, 64)])
def test_the_loss_between_padded_vocabularies_is_that_of_the_dense_definition(
    tmp_path, caplog, teacher_ids, student_ids
):
    traces = make_traces(5)
    if teacher_ids == TEACHER_IDS:
        traces = [of_padded_teacher(trace) for trace in traces]
    config = TrainConfig(
        cache=(make_cache(tmp_path / "cache", traces, vocab_size=teacher_ids),),
        student=make_student(tmp_path / "student", vocab_size=student_ids),
        out=tmp_path / "run", max_steps=1,
    )  # fmt: skip
    train(config)
    found = json.loads((tmp_path / "run/metrics.jsonl").read_text())

    model = make_model(student_ids).double()
    with torch.no_grad():
        losses = torch.cat(
            [
                trace_losses(
                    model(torch.from_numpy(trace.token_ids).long()[None]).logits[0], trace, 0.5
                )
                for trace in traces
            ]
        )
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    num_absent = sum(int((trace.top_ids >= student_ids).sum()) for trace in traces)
    assert found["num_absent_entries"] == num_absent
    assert (num_absent > 0) == (student_ids < teacher_ids)
    assert ("the student lacks; their mass was in the tail" in caplog.text) == (num_absent > 0)
