"""What must not make a CPU wait for a GPU, shown without one: by the operations that would."""

import pytest
import torch
from fakes import make_trace, make_traces
from students import make_family
from torch.utils._python_dispatch import TorchDispatchMode

import student_train.batch.prepared as prepared_module
from student_train.batch.loss_tokens import Teaching
from student_train.batch.micro_batch import MicroBatch, micro_batches
from student_train.batch.prepared import prepared
from student_train.data.stream import Cursor, StreamStep
from student_train.data.tokens import TokenSelection
from student_train.losses import sparse_kl
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of

aten = torch.ops.aten
# Their results, or the shapes of these, are known only once the device has computed them.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.bincount.default, aten.equal.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails at the first operation for which a CPU waits for its GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert function not in WAITING and not by_mask, function
        return function(*args, **(kwargs or {}))


def a_batch(*, layout="packed"):
    traces = [*make_traces(6, lengths=(9, 40)), make_trace("hard", 30, without_entries=(20,))]
    batch, *_ = micro_batches(
        TokenSelection().selected(traces), batch_tokens=2000, loss_reduction="token",
        layout=layout, teaching=Teaching(hard_labels=True),
    )  # fmt: skip
    assert (batch.position_ids is not None) == (layout == "packed")
    return batch


# A mixture of experts is left out: `transformers` asks which experts have tokens.
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize("layout", ["alone", "packed"])
def test_nothing_in_a_micro_batch_waits_for_the_device(family, layout):
    model = make_family(family)
    student = StudentWithLoss(model, head_of(model), num_sources=2)
    batch = a_batch(layout=layout)
    with NoWaiting():
        loss, _ = student(batch.to(torch.device("cpu")))
        (loss * 0.1).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: bool((values > 0).all()),
    ],
)
def test_the_watch_notices_what_waits(wait):
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(3))


def test_only_a_caller_that_may_have_weights_of_zero_pays_for_finding_them():
    batch = a_batch()
    hidden, weight = torch.randn(batch.num_valid, 8), torch.randn(60, 8)
    arguments = (hidden, weight, batch.targets, batch.token_weight)
    with NoWaiting():
        found = sparse_kl(*arguments, has_zero_weights=False)
    assert torch.equal(found.loss, sparse_kl(*arguments).loss)
    with pytest.raises(AssertionError), NoWaiting():
        sparse_kl(*arguments)


def test_integers_travel_as_int32_and_arrive_as_what_indexing_takes():
    batch = a_batch()
    tensors = []
    batch._with_tensors(lambda tensor: tensors.append(tensor) or tensor)
    assert {tensor.dtype for tensor in tensors} == {torch.int32, torch.float32}
    arrived = batch.to(torch.device("cpu"))
    for name in ("input_ids", "position_ids", "hidden_index", "source"):
        assert getattr(arrived, name).dtype == torch.int64
        assert torch.equal(getattr(arrived, name), getattr(batch, name))


def test_a_gpus_batches_are_pinned_by_the_thread_on_the_gpu_of_its_process(monkeypatch):
    events = []

    class OnGpu:
        def __init__(self, device):
            events.append(device)

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *_):
            events.append("exit")

    monkeypatch.setattr(prepared_module.torch.cuda, "device", OnGpu)
    monkeypatch.setattr(MicroBatch, "pinned", lambda batch: events.append("pinned") or batch)
    step = StreamStep(Cursor(0, 1), 0, [], ("a", "b"), 17)
    batches = [a_batch(), a_batch()]
    gpu = torch.device("cuda", 3)
    ready = prepared(step, lambda traces, epoch: batches, gpu)

    assert events == [gpu, "enter", "pinned", "pinned", "exit"]
    assert ready.batches == batches
    assert (ready.cursor, ready.trace_ids, ready.bytes_read) == (Cursor(0, 1), ("a", "b"), 17)


def test_all_of_a_batch_is_pinned_and_all_of_it_is_copied_without_waiting(monkeypatch):
    pinned, copied = [], []
    real_to = torch.Tensor.to

    def to(tensor, *args, **settings):
        copied.append(settings)
        return real_to(tensor, *args, **settings)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    batch = a_batch()
    ready = batch.pinned()
    assert len(pinned) == 12  # seven of the batch, five of its targets
    monkeypatch.setattr(torch.Tensor, "to", to)
    ready.to(torch.device("cpu"))
    assert copied == [{"non_blocking": True}] * 12
