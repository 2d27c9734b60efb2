"""The Triton kernels in Triton's interpreter, against float64 and PyTorch's passes.

Run by test_triton_rows in a process of its own: Triton reads TRITON_INTERPRET once, on import.
"""

from dataclasses import fields, replace

import loss_cases
import pytest
import reference
import torch

from student_train.losses import (
    chunks,
    sparse_kl,
    sparse_kl_per_token,
    triton_fused,
    triton_rows,
    triton_scale,
)
from student_train.losses.head import HeadProducts
from student_train.losses.rows import RowGradients, RowResults, TorchPasses
from student_train.objective import Objective

# A row whose entries are all kept has -inf - -inf in columns that are then written over, and
# quotients that `where` leaves out divide by 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

HEADS = [
    {"softcap": 2.0, "logit_scale": -0.7, "divergence": "jsd", "mix": 0.4, "ce_weight": 0.5},
    {"tail": "renormalise", "temperature": 0.7, "ce_weight": 0.3, "softcap": 3.0},
]
OBJECTIVES = [*loss_cases.allowed_objectives(), *HEADS]
SOME_OBJECTIVES = [{"ce_weight": 0.3}, {"tail": "zero", "ce_weight": 0.0}, *HEADS]


class PassesAlone(triton_rows.TritonPasses):
    """The kernels for a vocabulary that is split over processes."""

    max_fused_kept = 0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of most shapes take several blocks, and end inside one."""
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)
    monkeypatch.setattr(triton_fused, "BLOCK", 64)


def use(monkeypatch, passes_cls):
    monkeypatch.setattr(chunks, "passes_type", lambda device_type: passes_cls)


def case(num_rows, num_vocab, hidden_size):
    """Rows with k = V, V - 1 and ragged, the last but one without a distribution."""
    generator = torch.Generator().manual_seed(num_vocab)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_vocab, hidden_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_vocab, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(num_rows, num_vocab, generator=generator)
    k = torch.randint(1, min(num_vocab, 20), (num_rows,), generator=generator)
    k[-1] = num_vocab - 1
    k[0] = num_vocab
    realised = torch.randint(num_vocab, (num_rows,), generator=generator)
    targets = loss_cases.targets_of(teacher, k, realised, dtype=torch.float64)
    if num_rows > 2:
        targets = loss_cases.without_distributions(targets, [num_rows - 2])
    operands = tuple(each.requires_grad_() for each in (hidden, weight, bias))
    return operands, targets, torch.rand(num_rows, generator=generator) + 0.1


def assert_equals_definition(settings, operands, targets, token_weight, **options):
    hidden, weight, bias = operands
    objective = Objective(**settings)
    got = sparse_kl(hidden, weight, targets, token_weight, objective, bias=bias, **options).loss
    losses = reference.sparse_kl(hidden, weight, targets, bias=bias, **settings)
    expected = (losses * token_weight).sum()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, operands), torch.autograd.grad(expected, operands), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", OBJECTIVES, ids=loss_cases.objective_id)
def test_the_fused_kernel_equals_the_definition(monkeypatch, settings):
    use(monkeypatch, triton_rows.TritonPasses)
    operands, targets, token_weight = case(4, 100, 3)
    assert_equals_definition(settings, operands, targets, token_weight, chunk_bytes=1)


@pytest.mark.parametrize("settings", SOME_OBJECTIVES, ids=loss_cases.objective_id)
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 17, 3)], ids=str)
@pytest.mark.parametrize("passes", [triton_rows.TritonPasses, PassesAlone])
def test_small_vocabularies_and_the_separate_passes(monkeypatch, passes, shape, settings):
    use(monkeypatch, passes)
    assert_equals_definition(settings, *case(*shape), chunk_bytes=1)


def test_gradients_of_several_chunks_are_multiplied_together(monkeypatch):
    use(monkeypatch, triton_rows.TritonPasses)
    monkeypatch.setattr(triton_fused.FusedRows, "chunks_per_product", 3)
    created = triton_fused.FusedRows.__init__

    def collecting(self, *arguments):
        created(self, *arguments)
        self._collects = True

    monkeypatch.setattr(triton_fused.FusedRows, "__init__", collecting)
    row = 32 * 8 * 4  # a row of logits and three of gradients
    for num_rows in (1, 4, 7):
        operands, targets, token_weight = case(num_rows, 17, 3)
        assert_equals_definition(
            SOME_OBJECTIVES[0], operands, targets, token_weight, chunk_bytes=row * 2
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_narrow_gradients_are_those_of_pytorch_rounded_once(dtype, scale):
    """Ties at the extremes included: logits of +-1e4, and rows of one value."""
    num_rows, num_vocab, width = 6, 147, 160
    operands, targets, token_weight = case(num_rows, num_vocab, 3)
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(num_rows, width, generator=generator)
    logits[1], logits[2] = scale, scale * (torch.rand(width, generator=generator) < 0.5)
    targets = loss_cases.as_dtype(targets, torch.float32)
    objective = Objective(divergence="jsd", ce_weight=0.3)

    def head(operand_dtype):
        made = HeadProducts(
            operands[0].detach(), operands[1].detach(), None, torch.float32, (False,) * 3
        )
        made._weight_VD = made._weight_VD.to(operand_dtype)
        return made

    def results():
        floats = [torch.full((num_rows,), torch.nan) for _ in range(3)]
        return RowResults(*floats, top1=torch.zeros(num_rows, dtype=torch.bool))

    fused = triton_fused.FusedRows(objective, targets, head(dtype), token_weight)
    plain = chunks.RowSteps(
        objective, targets, head(torch.float32), token_weight, None, TorchPasses
    )
    found, expected = results(), results()
    gradient = fused(0, 0, logits.clone(), found)[:, :num_vocab]
    truth = plain(0, 0, logits.clone(), expected)[:, :num_vocab]
    assert gradient.dtype == dtype
    for item in fields(RowResults):
        one, other = getattr(found, item.name), getattr(expected, item.name)
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.float(), truth, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_rows_of_weight_zero_have_no_gradient_and_their_parts(monkeypatch):
    use(monkeypatch, triton_rows.TritonPasses)
    operands, targets, _ = case(5, 17, 3)
    output = sparse_kl_per_token(*operands[:2], targets)
    (gradient,) = torch.autograd.grad(output.loss, operands[0], torch.tensor([1.0, 0, 1, 0, 1]))
    assert (gradient.abs().sum(dim=1) == 0).tolist() == [False, True, False, True, False]
    assert (output.ce > 0).all()
    assert (output.kl == 0).tolist() == [False, False, False, True, False]


def test_nan_in_the_students_logits_is_not_hidden(monkeypatch):
    use(monkeypatch, triton_rows.TritonPasses)
    operands, targets, token_weight = case(5, 147, 3)
    weight = operands[1].detach().clone()
    weight[100] = torch.nan
    loss = sparse_kl(operands[0], weight, targets, token_weight).loss
    assert loss.isnan()


def test_a_tie_is_no_agreement(monkeypatch):
    use(monkeypatch, triton_rows.TritonPasses)
    _, targets, token_weight = case(3, 403, 4)
    targets = replace(targets, k=targets.k.clamp(min=1))
    weight = torch.eye(403, dtype=torch.float64)
    likeliest = weight[targets.top_ids[:, 0].long()]
    top1 = sparse_kl(likeliest, weight, targets, token_weight).top1
    assert top1.all()
    nothing_known = torch.zeros(3, 403, dtype=torch.float64)
    assert not sparse_kl(nothing_known, weight, targets, token_weight).top1.any()


def masked_logits(num_rows, width, scale):
    generator = torch.Generator().manual_seed(width)
    logits = scale * torch.randn(num_rows, width, generator=generator)
    masked = torch.rand(num_rows, width, generator=generator) < 0.3
    masked[-1] = True  # a row whose entries are all kept
    return logits.masked_fill(masked, -torch.inf), masked


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_equal_those_of_pytorch_also_packed_into_half_a_row(dtype, temperature, scale):
    objective = Objective(tail="renormalise", temperature=temperature)
    width = 336
    logits, masked = masked_logits(4, width, scale)
    gradients = RowGradients(
        tail=torch.tensor([0.5, -2.0, 0.0, 1.0]),
        tail_ce=torch.tensor([0.25, 1.0, 3.0, 1.0]),
        columns=torch.tensor([[3], [0], [width - 1], [7]]),
        values=torch.tensor([[1.5], [-0.25], [1e-4], [2.0]]),
    )
    results = []
    for passes in (TorchPasses(objective), triton_rows.TritonPasses(objective)):
        buffer = logits.clone()
        sums = passes.reduce_(buffer)
        gradient = passes.gradient_(buffer, gradients, dtype)
        assert gradient.dtype == dtype
        gradient = (
            gradient.float()
            .masked_fill(masked, 0.0)
            .scatter(1, gradients.columns, gradient.gather(1, gradients.columns).float())
        )
        results.append((sums.peak, sums.rest, sums.rest_tempered, gradient))
    for one, other in zip(*results, strict=True):
        tolerance = max(torch.finfo(dtype).eps, 1e-6) if one.dim() == 2 else 1e-6
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, -0.25])
@pytest.mark.parametrize("num_values", [0, 1, 4096 * 3 + 5])
def test_a_factor_multiplies_in_place_and_one_leaves_all_as_it_is(monkeypatch, num_values, factor):
    monkeypatch.setattr(triton_scale, "_NUM_PROGRAMS", 2)
    values = torch.linspace(-1, 1, num_values)
    expected = values * factor
    triton_scale.multiply_(values, torch.tensor(factor))
    assert torch.equal(values, expected)


def test_many_kept_entries_take_the_separate_passes(monkeypatch):
    use(monkeypatch, type("Few", (triton_rows.TritonPasses,), {"max_fused_kept": 4}))
    monkeypatch.setattr(triton_fused, "_evaluate_row", None)
    operands, targets, token_weight = case(3, 17, 3)
    assert targets.top_ids.shape[1] > 4
    assert_equals_definition({"ce_weight": 0.3}, operands, targets, token_weight)
