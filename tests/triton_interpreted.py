"""The Triton kernels in Triton's interpreter, against float64 and PyTorch's passes.

Run by test_triton_rows in a process of its own: Triton reads TRITON_INTERPRET once, on import.
"""

import loss_cases
import pytest
import reference
import torch

from student_train.losses import chunks, sparse_kl, triton_rows
from student_train.losses.rows import RowGradients, TorchPasses
from student_train.objective import Objective

# A row whose entries are all kept has -inf - -inf in columns that are then written over.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

SHAPES = [(1, 2, 1), (5, 17, 3), (3, 403, 4)]  # rows, vocabulary, hidden size
OBJECTIVES = [
    {"ce_weight": 0.0},
    {"ce_weight": 0.3},
    {"tail": "zero", "ce_weight": 0.0},
    {"divergence": "jsd", "mix": 0.4, "ce_weight": 0.5, "softcap": 2.0},
    {"divergence": "reverse_kl", "logit_scale": 0.7, "ce_weight": 0.0},
    {"tail": "renormalise", "temperature": 0.7, "ce_weight": 0.3, "softcap": 3.0},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of most shapes take several blocks, and end inside one."""
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)


def case(num_rows, num_vocab, hidden_size):
    generator = torch.Generator().manual_seed(num_vocab)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_vocab, hidden_size, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(num_rows, num_vocab, generator=generator)
    k = torch.randint(1, min(num_vocab, 20), (num_rows,), generator=generator)
    k[-1] = num_vocab - 1
    k[0] = num_vocab
    realised = torch.randint(num_vocab, (num_rows,), generator=generator)
    targets = loss_cases.targets_of(teacher, k, realised, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(num_rows) + 0.1


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_on_triton_kernels_equals_its_definition(monkeypatch, shape, settings):
    hidden, weight, targets, token_weight = case(*shape)
    monkeypatch.setattr(chunks, "passes_type", lambda device_type: triton_rows.TritonPasses)
    objective = Objective(**settings)
    got = sparse_kl(hidden, weight, targets, token_weight, objective, chunk_bytes=1).loss
    expected = (reference.sparse_kl(hidden, weight, targets, **settings) * token_weight).sum()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def masked_logits(num_rows, width, scale):
    generator = torch.Generator().manual_seed(width)
    logits = scale * torch.randn(num_rows, width, generator=generator)
    masked = torch.rand(num_rows, width, generator=generator) < 0.3
    masked[-1] = True  # a row whose entries are all kept
    return logits.masked_fill(masked, -torch.inf), masked


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("width", [80, 336])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_equal_those_of_pytorch_also_packed_into_half_a_row(
    dtype, temperature, width, scale
):
    objective = Objective(tail="renormalise", temperature=temperature)
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


def test_a_tie_is_no_agreement(monkeypatch):
    _, _, targets, token_weight = case(3, 403, 4)
    monkeypatch.setattr(chunks, "passes_type", lambda device_type: triton_rows.TritonPasses)
    weight = torch.eye(403, dtype=torch.float64)
    likeliest = weight[targets.top_ids[:, 0].long()]
    assert sparse_kl(likeliest, weight, targets, token_weight).top1.all()
    nothing_known = torch.zeros(3, 403, dtype=torch.float64)
    assert not sparse_kl(nothing_known, weight, targets, token_weight).top1.any()
