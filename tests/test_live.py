from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import POLICY, VOCAB_SIZE, make_header, make_trace
from students import make_model, make_student

from student_train.batch.micro_batch import empty_micro_batch, micro_batches
from student_train.data.tokens import TokenSelection
from student_train.losses import sparse_kl
from student_train.model import live_teacher
from student_train.model.live_teacher import LiveTeacher
from teacher_cache.format import CacheMismatchError, Trace, keep_entries

CPU = torch.device("cpu")


def trace_of(model, trace_id, num_tokens, seed):
    """A trace with the model's own distributions, as a capture keeps them."""
    token_ids = make_trace(trace_id, num_tokens, seed=seed).token_ids
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, :-1]
    best = logits.log_softmax(-1).topk(POLICY.top_k)
    realised = torch.from_numpy(token_ids[1:].astype(np.int64))[:, None]
    ids = torch.cat([realised, best.indices], dim=1)
    rows = logits.log_softmax(-1).gather(1, ids)
    kept = keep_entries(ids.int().numpy(), rows.numpy(), POLICY)
    return Trace(
        trace_id=trace_id,
        token_ids=token_ids,
        n_total=num_tokens,
        cot_start=2,
        answer_start=num_tokens - 2,
        k=np.concatenate([[0], kept.k]).astype(np.uint8),
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=np.concatenate([[0], kept.tail_logit]).astype("f4"),
    )


@pytest.fixture
def teacher(tmp_path):
    name = make_student(tmp_path / "teacher", seed=3)
    live = LiveTeacher(name, [make_header()], CPU, num_ids=VOCAB_SIZE)
    return live, make_model(seed=3).eval()


def batch_of(model):
    traces = [trace_of(model, f"t{n}", length, n) for n, length in enumerate((12, 7, 9))]
    (batch,) = micro_batches(
        TokenSelection(trace_tokens=8).selected(traces), batch_tokens=100, loss_reduction="token"
    )
    return batch


def test_targets_are_the_whole_distributions_of_the_tokens_that_count(teacher):
    live, model = teacher
    batch = batch_of(model)
    taught = live.taught(batch).targets.select(slice(None))

    assert taught.k.tolist() == [make_header().vocab_size] * batch.num_valid
    assert torch.equal(taught.target_ids, batch.targets.target_ids)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
    expected = logits.flatten(0, 1)[batch.hidden_index].softmax(-1)
    found = torch.zeros_like(expected).scatter(1, taught.top_ids, taught.top_logits.softmax(-1))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # The likeliest first, as a cache has it, and the cached entries agree with it.
    assert torch.equal(taught.top_ids[:, 0], batch.targets.top_ids[:, 0])


def test_the_loss_in_chunks_of_any_size_is_that_of_all_rows_at_once(teacher, monkeypatch):
    live, model = teacher
    batch = batch_of(model)
    monkeypatch.setattr(live_teacher, "_CHUNK_BYTES", 1)
    taught = live.taught(batch).targets
    assert taught.top_logits.untyped_storage().nbytes() == 4  # no [N, V] anywhere
    assert taught.top_ids.untyped_storage().nbytes() <= 8
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch.num_valid, 8), torch.randn(VOCAB_SIZE, 8)
    for targets, chunk_bytes in ((taught, 1), (taught, None)):
        found = sparse_kl(hidden, weight, targets, batch.token_weight, chunk_bytes=chunk_bytes)
        whole = sparse_kl(hidden, weight, taught.select(slice(None)), batch.token_weight)
        torch.testing.assert_close(found.kl, whole.kl, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.top1, whole.top1)


def test_a_batch_without_valid_tokens_stays_as_it_is(teacher):
    batch = empty_micro_batch()
    assert teacher[0].taught(batch) is batch


def test_another_teacher_than_the_captured_one_is_refused(teacher):
    live, _ = teacher
    with pytest.raises(CacheMismatchError, match=r"is not the one of the cache: the probabilities"):
        live.taught(batch_of(make_model(seed=4, initializer_range=1.0).eval()))


def test_another_width_is_refused(tmp_path):
    name = make_student(tmp_path / "wide", vocab_size=48)
    with pytest.raises(CacheMismatchError, match="has 48 outputs, the cache's teacher 'table' 41"):
        LiveTeacher(name, [make_header()], CPU, num_ids=VOCAB_SIZE)


@pytest.mark.parametrize("num_ids", [VOCAB_SIZE, VOCAB_SIZE + 7, VOCAB_SIZE - 3])
def test_students_padded_to_another_width_get_the_same_distribution(tmp_path, num_ids):
    name = make_student(tmp_path / "teacher", seed=3, initializer_range=0.5)
    live = LiveTeacher(name, [make_header()], CPU, num_ids=num_ids)
    model = make_model(seed=3, initializer_range=0.5).eval()
    trace = trace_of(model, "t", 12, 0)
    trace = replace(trace, token_ids=trace.token_ids.clip(max=num_ids - 1))
    (batch,) = micro_batches(
        TokenSelection().selected([trace]),
        batch_tokens=100,
        loss_reduction="token",
        num_ids=num_ids,
    )
    live._check = lambda *_: None  # the clipped trace is not the one that was captured
    targets = live.taught(batch).targets
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch.num_valid, 8), torch.randn(num_ids, 8)
    found = sparse_kl(hidden, weight, targets, batch.token_weight)

    log_q = (hidden @ weight.T).double().log_softmax(-1)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.hidden_index]
    log_p = logits.double().log_softmax(-1)
    shared = min(num_ids, VOCAB_SIZE)
    p, q = log_p[:, :shared].exp(), log_q[:, :shared].exp()
    kl = (p * (p.log() - q.log())).sum(-1)
    if num_ids >= VOCAB_SIZE:
        torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-5)
        assert found.teacher_mass.tolist() == [1.0] * batch.num_valid
    else:  # the student cannot have the teacher's mass there: its tail is empty
        torch.testing.assert_close(found.teacher_mass.double(), p.sum(-1), rtol=1e-4, atol=1e-5)


def test_a_cache_that_lacks_distributions_measures_nothing(teacher):
    live, model = teacher
    batch = batch_of(model)
    lacking = replace(batch, num_distributions=batch.num_valid - 1)
    left_out = replace(batch, num_left_out=1)
    for one in (lacking, left_out):
        with pytest.raises(CacheMismatchError, match="no distribution for some tokens"):
            live.taught(one)
