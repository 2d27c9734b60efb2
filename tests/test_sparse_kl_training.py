"""The loss as a training loop uses it: chunks, dtypes, gradients asked for and not, refusals."""

from dataclasses import replace

import loss_cases
import pytest
import torch

from student_train.losses import Objective, TeacherTargets, sparse_kl, sparse_kl_per_token
from student_train.run.config import TrainConfig


def case(dtype=torch.float64):
    return loss_cases.ragged_case(dtype, num_vocab=37, hidden_size=5)


def gradients(*arguments, scale=1.0, chunk_bytes=None):
    hidden, weight, *rest = arguments
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    loss = sparse_kl(hidden, weight, *rest, chunk_bytes=chunk_bytes).loss
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


def assert_same(first, second, **tolerance):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("num_chunk_rows", [1, 2, 3, 5, 7, 100])
def test_the_size_of_chunks_changes_nothing(num_chunk_rows):
    row_bytes = 48 * 8
    chunked = gradients(*case(), chunk_bytes=num_chunk_rows * row_bytes)
    whole = gradients(*case())
    assert_same(chunked, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_are_bit_identical(dtype):
    first = gradients(*case(dtype), chunk_bytes=1000)
    second = gradients(*case(dtype), chunk_bytes=1000)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_rows_of_weight_0_are_not_looked_at():
    hidden, weight, targets, token_weight = case()
    poisoned = hidden.clone()
    poisoned[token_weight == 0] = torch.nan
    plain = gradients(hidden, weight, targets, token_weight)
    assert_same(gradients(poisoned, weight, targets, token_weight), plain)
    assert (plain[1][token_weight == 0] == 0).all()


def test_the_upstream_gradient_multiplies():
    plain = gradients(*case())
    scaled = gradients(*case(), scale=-2.5)
    assert_same(scaled[1:], [-2.5 * gradient for gradient in plain[1:]])


def test_a_retained_graph_can_be_walked_again():
    hidden, weight, targets, token_weight = case()
    _, *expected = gradients(hidden, weight, targets, token_weight)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = sparse_kl(hidden, weight, targets, token_weight).loss
    for scale in (2.0, 3.0):
        walked = torch.autograd.grad(scale * loss, (hidden, weight), retain_graph=True)
        assert_same(walked, [scale * gradient for gradient in expected])


def test_accumulated_micro_batches_equal_one_batch():
    hidden, weight, targets, token_weight = case()
    _, _, expected = gradients(hidden, weight, targets, token_weight)
    weight = weight.requires_grad_()
    for rows in (slice(0, 3), slice(3, 8)):
        part = targets.select(rows)
        sparse_kl(hidden[rows], weight, part, token_weight[rows]).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("function", [sparse_kl, sparse_kl_per_token])
def test_a_frozen_operand_gets_no_gradient_and_changes_no_other(function):
    hidden, weight, targets, token_weight = case()
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    extra = (token_weight,) if function is sparse_kl else ()

    def run(*required):
        operands = [t.detach().clone() for t in (hidden, weight, bias)]
        for operand, wanted in zip(operands, required, strict=True):
            operand.requires_grad_(wanted)
        loss = function(*operands[:2], targets, *extra, bias=operands[2]).loss
        loss.sum().backward()
        return [operand.grad for operand in operands]

    everything = run(True, True, True)
    for required in ((True, False, False), (False, True, False), (False, False, True)):
        for got, wanted, full in zip(run(*required), required, everything, strict=True):
            if wanted:
                torch.testing.assert_close(got, full)
            else:
                assert got is None


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, targets, token_weight = case()
    expected, *_ = gradients(hidden, weight, targets, token_weight)
    with torch.no_grad():
        output = sparse_kl(hidden, weight.requires_grad_(), targets, token_weight)
    assert torch.equal(output.loss, expected)
    assert not output.loss.requires_grad


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_valid_token_is_a_loss_of_0_that_can_be_differentiated(num_rows):
    hidden, weight, targets, token_weight = case()
    hidden, weight = hidden[:num_rows].requires_grad_(), weight.requires_grad_()
    output = sparse_kl(hidden, weight, targets.select(slice(num_rows)), 0 * token_weight[:num_rows])
    output.loss.backward()
    assert output.loss == 0
    assert output.kl.shape == output.top1.shape == (num_rows,)
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_losses_and_sums_in_float32(dtype):
    hidden, weight, targets, token_weight = case(dtype)
    output = sparse_kl(hidden, weight, targets, token_weight)
    assert output.loss.dtype == output.kl.dtype == torch.float32
    expected = gradients(hidden.double(), weight.double(), targets, token_weight)
    got = gradients(hidden, weight, targets, token_weight, chunk_bytes=1)
    assert [tensor.dtype for tensor in got] == [torch.float32, dtype, dtype]
    # One rounding, of the result: the sum over eight chunks added none of its own.
    rounded = [tensor.to(dtype) for tensor in expected[1:]]
    assert_same(got[1:], rounded, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_float16_gradients_survive_weights_that_float16_cannot_hold():
    hidden, weight, targets, token_weight = case(torch.float16)
    loss_scale = 2.0**20
    tiny = (token_weight / loss_scale**1.2).float()
    expected = gradients(hidden, weight, targets, token_weight)
    got = gradients(hidden, weight, targets, tiny, scale=loss_scale**1.2)
    assert_same(got[1:], expected[1:], rtol=2e-3, atol=1e-6)


def test_autocast_computes_with_rounded_operands_and_returns_full_gradients():
    hidden, weight, targets, token_weight = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(hidden, weight, targets, token_weight)
    rounded = [tensor.bfloat16().float() for tensor in (hidden, weight)]
    assert_same(got, gradients(*rounded, targets, token_weight))


def test_per_token_losses_can_be_reduced_in_any_way():
    hidden, weight, targets, token_weight = case()
    operands = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    output = sparse_kl_per_token(*operands, targets)
    loss = (output.loss * token_weight).sum()
    got = [loss.detach(), *torch.autograd.grad(loss, operands)]
    assert_same(got, gradients(hidden, weight, targets, token_weight))
    assert output.loss.shape == (len(hidden),)


# Dynamo itself looks at .grad of the tensors that it carries over the graph break.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_caller_gets_the_same(backend):
    hidden, weight, targets, token_weight = case()
    body = torch.eye(5, dtype=torch.float64) * 1.5

    def step(hidden, weight):
        return sparse_kl(torch.tanh(hidden @ body), weight, targets, token_weight).loss * 2

    results = []
    for function in (step, torch.compile(step, backend=backend)):
        operands = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
        loss = function(*operands)
        results.append([loss.detach(), *torch.autograd.grad(loss, operands)])
    assert_same(*results)


def test_activation_checkpointing_of_the_body_changes_nothing():
    hidden, weight, targets, token_weight = case()
    body = torch.nn.Linear(5, 5, dtype=torch.float64)

    def step(checkpointed):
        body.zero_grad()
        if checkpointed:
            outputs = torch.utils.checkpoint.checkpoint(body, hidden, use_reentrant=False)
        else:
            outputs = body(hidden)
        sparse_kl(outputs.tanh(), weight, targets, token_weight).loss.backward()
        return body.weight.grad.clone()

    assert torch.equal(step(True), step(False))


def test_tied_embeddings_get_both_gradients():
    _, weight, targets, token_weight = case()
    tokens = torch.arange(8)

    def grad(embedding, head):
        return sparse_kl(embedding[tokens].tanh(), head, targets, token_weight).loss

    tied = weight.clone().requires_grad_()
    grad(tied, tied).backward()
    apart = [weight.clone().requires_grad_() for _ in range(2)]
    grad(*apart).backward()
    torch.testing.assert_close(tied.grad, apart[0].grad + apart[1].grad)


def test_lora_on_the_head_trains_through_the_merged_weight():
    hidden, weight, targets, token_weight = case()
    down = torch.ones(2, 5, dtype=torch.float64) / 5
    down, up = down.requires_grad_(), torch.ones(37, 2, dtype=torch.float64).requires_grad_()
    loss = sparse_kl(hidden, weight + up @ down, targets, token_weight).loss
    loss.backward()
    _, _, dense = gradients(hidden, (weight + up @ down).detach(), targets, token_weight)
    torch.testing.assert_close(down.grad, up.detach().T @ dense)
    torch.testing.assert_close(up.grad, dense @ down.detach().T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "divergence: expected one of forward_kl, "),
        ({"tail": "drop"}, "tail: expected one of bucket, renormalise, zero, got 'drop'"),
        ({"temperature": 2.0}, "temperature 2.0 with tail='bucket': a cache holds the tail's mass"),
        ({"temperature": 2.0, "tail": "zero"}, "temperature 2.0 with tail='zero'"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"divergence": "reverse_kl", "tail": "renormalise"}, "reverse_kl .* is infinite"),
        ({"divergence": "combined_kl", "tail": "renormalise"}, "combined_kl .* is infinite"),
        ({"divergence": "reverse_kl", "tail": "zero"}, "reverse_kl with tail='zero' is no diverg"),
        ({"divergence": "jsd", "tail": "zero"}, "jsd with tail='zero' is no divergence"),
        ({"divergence": "jsd", "mix": 1.0}, "mix: expected 0 < mix < 1, got 1.0"),
        ({"mix": 0.5}, "mix: forward_kl has none, got 0.5"),
        ({"ce_weight": 1.5}, r"ce_weight: expected a share in \[0, 1\], got 1.5"),
        ({"softcap": -1.0}, "softcap: expected a positive number, got -1.0"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a finite number, got nan"),
    ],
)
def test_objectives_without_meaning_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_the_default_weight_of_the_cross_entropy_is_that_of_the_command():
    assert Objective().ce_weight == TrainConfig.ce_weight == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(8, 4)}, r"expected \[N, D\] and \[V, D\], got \[8, 4\] and"),
        ({"hidden_ND": torch.zeros(7, 5)}, "targets: expected 7 rows, as hidden_ND, got 8"),
        ({"hidden_ND": torch.zeros(8, 5).half()}, "hidden_ND is torch.float16 but weight_VD torch"),
        ({"weight_VD": torch.zeros(4, 5)}, "top_ids: 37 columns, but the head has 4 outputs"),
        ({"bias": torch.zeros(3)}, r"bias: expected \[37\], got \[3\]"),
        ({"token_weight_N": torch.ones(8, 1)}, r"token_weight_N: expected \[8\] floats, got"),
        ({"token_weight_N": torch.ones(8).bool()}, "floats, got .* of torch.bool"),
        ({"token_weight_N": torch.ones(8).requires_grad_()}, "is a constant here: detach it"),
        ({"chunk_bytes": 0}, "chunk_bytes: expected at least 1, got 0"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    hidden, weight, targets, token_weight = case(torch.float32)
    arguments = {"hidden_ND": hidden, "weight_VD": weight, "token_weight_N": token_weight}
    with pytest.raises(ValueError, match=message):
        sparse_kl(targets=targets, **{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_ids": torch.zeros(8, dtype=torch.int64)}, r"top_ids: expected \[N, K\]"),
        ({"top_ids": torch.zeros(8, 37)}, "top_ids: expected torch.int32 or torch.int64, got"),
        ({"top_logits": torch.zeros(8, 36)}, r"top_logits: expected \[8, 37\], got \[8, 36\]"),
        ({"k": torch.zeros(8)}, "k: expected torch.uint8 or .*, got torch.float32"),
        ({"tail_logit": torch.zeros(8).half()}, "tail_logit: expected torch.float32 or .*float16"),
        ({"target_ids": torch.zeros(9, dtype=torch.int64)}, r"target_ids: expected \[8\], got"),
        ({"k": torch.ones(8, dtype=torch.int64, device="meta")}, "k is on meta but top_ids on cpu"),
    ],
)
def test_targets_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(case()[2], **change)


def test_targets_are_what_the_names_promise():
    targets = case()[2]
    assert isinstance(targets.select(torch.tensor([2, 0])), TeacherTargets)
    assert targets.select(torch.tensor([2, 0])).k.tolist() == [3, 1]
    assert targets.kept().sum(dim=1).tolist() == targets.k.tolist()
    assert len(targets) == 8
