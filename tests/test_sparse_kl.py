"""The loss against its definitions, in float64: values, gradients, identities."""

import itertools

import loss_cases
import pytest
import reference
import torch

from student_train.losses import Objective, sparse_kl, sparse_kl_per_token

ALLOWED = list(loss_cases.allowed_objectives())
SETTINGS = [
    {},
    {"softcap": 2.0},
    {"logit_scale": 0.5},
    {"softcap": 3.0, "logit_scale": 1.7, "temperature": 2.0, "tail": "renormalise"},
]
TWO_ROWS_OF_SEVEN = 2 * 16 * 8  # bytes: the buffer's rows are padded to 16 columns


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def loss_and_gradients(function, *operands):
    operands = [leaf(operand) for operand in operands]
    loss = function(*operands)
    return [loss, *torch.autograd.grad(loss, operands)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ALLOWED, ids=loss_cases.objective_id)
def test_gradcheck_holds_for_every_allowed_objective(objective):
    hidden, weight, targets, token_weight = loss_cases.ragged_case()

    def loss(hidden, weight):
        return sparse_kl(
            hidden, weight, targets, token_weight, Objective(**objective),
            chunk_bytes=3 * TWO_ROWS_OF_SEVEN,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (leaf(hidden), leaf(weight)))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_gradcheck_holds_through_bias_softcap_and_scale(settings, ce_weight):
    hidden, weight, targets, token_weight = loss_cases.ragged_case()
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)

    def loss(hidden, weight, bias):
        return sparse_kl(
            hidden, weight, targets, token_weight, Objective(ce_weight=ce_weight, **settings),
            bias=bias,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (leaf(hidden), leaf(weight), leaf(bias)))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ALLOWED[:: len(ALLOWED) // 6], ids=loss_cases.objective_id)
def test_gradcheck_holds_per_token(objective):
    hidden, weight, targets, _ = loss_cases.ragged_case()

    def losses(hidden, weight):
        output = sparse_kl_per_token(
            hidden, weight, targets, Objective(**objective), chunk_bytes=300
        )
        return output.loss

    assert torch.autograd.gradcheck(losses, (leaf(hidden), leaf(weight)))


@pytest.mark.parametrize("objective", ALLOWED, ids=loss_cases.objective_id)
def test_equals_the_dense_definition_to_1e_12(objective):
    hidden, weight, targets, token_weight = loss_cases.ragged_case(num_vocab=41, hidden_size=5)

    def ours(hidden, weight):
        output = sparse_kl(
            hidden, weight, targets, token_weight, Objective(**objective), chunk_bytes=1
        )
        return output.loss

    def per_token(hidden, weight):
        losses = sparse_kl_per_token(hidden, weight, targets, Objective(**objective)).loss
        return (losses * token_weight).sum()

    def dense(hidden, weight):
        return (reference.sparse_kl(hidden, weight, targets, **objective) * token_weight).sum()

    expected = loss_and_gradients(dense, hidden, weight)
    for function in (ours, per_token):
        for got, want in zip(loss_and_gradients(function, hidden, weight), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ALLOWED, ids=loss_cases.objective_id)
def test_a_row_without_a_distribution_has_its_share_of_the_cross_entropy_alone(objective):
    hidden, weight, whole, token_weight = loss_cases.ragged_case()
    targets = loss_cases.without_distributions(whole, [2, 4])
    settings = Objective(**objective)

    def ours(hidden, weight):
        return sparse_kl(hidden, weight, targets, token_weight, settings, chunk_bytes=1).loss

    def per_token(hidden, weight):
        losses = sparse_kl_per_token(hidden, weight, targets, settings).loss
        return (losses * token_weight).sum()

    def dense(hidden, weight):
        return (reference.sparse_kl(hidden, weight, targets, **objective) * token_weight).sum()

    expected = loss_and_gradients(dense, hidden, weight)
    for function in (ours, per_token):
        for got, want in zip(loss_and_gradients(function, hidden, weight), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    parts = sparse_kl_per_token(hidden, weight, targets, settings)
    before = sparse_kl_per_token(hidden, weight, whole, settings)
    for name in ("kl", "student_mass", "teacher_mass", "top1"):
        found = getattr(parts, name)
        assert not found[[2, 4]].any()
        assert torch.equal(found[[0, 1, 3, 5, 6, 7]], getattr(before, name)[[0, 1, 3, 5, 6, 7]])
    torch.testing.assert_close(parts.ce, before.ce, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bias_softcap_and_scale_equal_the_dense_definition(settings):
    hidden, weight, targets, token_weight = loss_cases.ragged_case()
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    settings = {"ce_weight": 0.4, **settings}

    def ours(hidden, weight, bias):
        objective = Objective(**settings)
        return sparse_kl(hidden, weight, targets, token_weight, objective, bias=bias).loss

    def dense(hidden, weight, bias):
        losses = reference.sparse_kl(hidden, weight, targets, bias=bias, **settings)
        return (losses * token_weight).sum()

    expected = loss_and_gradients(dense, hidden, weight, bias)
    for got, want in zip(loss_and_gradients(ours, hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_parts_are_what_they_are_called():
    hidden, weight, targets, token_weight = loss_cases.ragged_case()
    objective = Objective(ce_weight=0.25)
    output = sparse_kl(leaf(hidden), leaf(weight), targets, token_weight, objective)
    q = torch.softmax(hidden @ weight.T, dim=1)
    for n, k in enumerate(targets.k.tolist()):
        kl, ce = reference.token_parts(q.log(), targets, n, "forward_kl", None, "bucket", 1.0)
        kept = targets.top_ids[n, :k]
        if token_weight[n] == 0:
            assert output.kl[n] == output.ce[n] == output.student_mass[n] == 0
            continue
        torch.testing.assert_close(output.kl[n], kl)
        torch.testing.assert_close(output.ce[n], ce)
        torch.testing.assert_close(output.student_mass[n], q[n, kept].sum())
        others = q[n].index_fill(0, kept[:1], -torch.inf)
        assert output.top1[n] == (q[n, kept[0]] > others.max())
    torch.testing.assert_close(output.teacher_mass, 1 - torch.sigmoid(targets.tail_logit))
    weighted = token_weight * (0.75 * output.kl + 0.25 * output.ce)
    torch.testing.assert_close(output.loss, weighted.sum())
    parts = (output.kl, output.ce, output.student_mass, output.teacher_mass, output.top1)
    assert not any(part.requires_grad for part in parts)
    assert output.loss.requires_grad


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_tie_is_no_agreement(k):
    """With the tail, with another kept entry, or with all that there are."""
    teacher = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]], dtype=torch.float64)
    targets = loss_cases.targets_of(teacher, k, dtype=torch.float64)
    weight, one = torch.eye(5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def agrees(logits):
        hidden = torch.tensor([logits], dtype=torch.float64)
        return sparse_kl(hidden, weight, targets, one).top1.item()

    assert agrees([3.0, 1.0, 1.0, 1.0, 1.0])
    assert not agrees([1.0] * 5)  # a student that knows nothing
    assert not agrees([3.0, 3.0, 0.0, 0.0, 0.0])
    assert not agrees([3.0, 0.0, 0.0, 0.0, 3.0])
    assert not agrees([3.0, 0.0, 0.0, 0.0, 4.0])


def kl_at(k, teacher_logits, logits, **objective):
    targets = loss_cases.targets_of(teacher_logits, k, dtype=torch.float64)
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    objective = Objective(ce_weight=0.0, **objective)
    return sparse_kl_per_token(logits, identity, targets, objective).loss


def random_logits(num_rows, num_vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_rows, num_vocab)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).unbind(0)


@pytest.mark.parametrize(("name", "mix"), loss_cases.DIVERGENCES)
def test_a_bucket_bounds_the_dense_divergence_below_and_rises_with_k_to_it(name, mix):
    teacher, student = random_logits(6, 23)
    rising = [kl_at(k, teacher, student, divergence=name, mix=mix) for k in range(1, 24)]
    for lower, higher in itertools.pairwise(rising):
        assert (lower <= higher + 1e-14).all()
    p, q = torch.softmax(teacher, dim=1), torch.softmax(student, dim=1)
    dense = [reference.divergence(name, mix, p[n], q[n]) for n in range(6)]
    torch.testing.assert_close(rising[-1], torch.stack(dense), rtol=1e-12, atol=1e-12)


def test_a_zero_tail_is_the_kept_mass_times_renormalised_plus_its_logarithm():
    teacher, student = random_logits(6, 23)
    mass = torch.sigmoid(-loss_cases.targets_of(teacher, 4, dtype=torch.float64).tail_logit)
    zero = kl_at(4, teacher, student, tail="zero")
    renormalised = kl_at(4, teacher, student, tail="renormalise")
    torch.testing.assert_close(zero, mass * (renormalised + mass.log()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "mix"), loss_cases.DIVERGENCES)
def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(name, mix):
    teacher, _ = random_logits(6, 23)
    targets = loss_cases.targets_of(teacher, [1, 2, 5, 9, 22, 23], dtype=torch.float64)
    student, identity = leaf(teacher), torch.eye(23, dtype=torch.float64)
    objective = Objective(divergence=name, mix=mix, ce_weight=0.0)
    loss = sparse_kl(student, identity, targets, torch.ones(6), objective).loss
    (gradient,) = torch.autograd.grad(loss, student)
    # abs(p - q) has a kink there: rounding decides the sign, not the size, of its gradient.
    assert abs(loss) < 1e-14
    if name != "tvd":
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("objective", ALLOWED, ids=loss_cases.objective_id)
def test_gradient_rows_sum_to_zero(objective):
    teacher, student = random_logits(6, 23)
    targets = loss_cases.targets_of(teacher, [1, 2, 5, 9, 22, 23], [3] * 6, dtype=torch.float64)
    student, identity = leaf(student), torch.eye(23, dtype=torch.float64)
    loss = sparse_kl(student, identity, targets, torch.ones(6), Objective(**objective)).loss
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("objective", ALLOWED, ids=loss_cases.objective_id)
def test_a_constant_added_to_a_rows_logits_changes_nothing(objective):
    teacher, student = random_logits(6, 23)
    targets = loss_cases.targets_of(teacher, 5, dtype=torch.float64)
    identity, weight = torch.eye(23, dtype=torch.float64), torch.ones(6)
    objective = Objective(**objective)
    plain = sparse_kl(student, identity, targets, weight, objective).loss
    shifted = sparse_kl(student + 1000, identity, targets, weight, objective).loss
    torch.testing.assert_close(plain, shifted, rtol=1e-11, atol=1e-11)


def test_the_order_of_kept_entries_does_not_matter():
    teacher, student = random_logits(6, 23)
    targets = loss_cases.targets_of(teacher, 5, dtype=torch.float64)
    identity = torch.eye(23, dtype=torch.float64)
    fields = {"k": targets.k, "tail_logit": targets.tail_logit}
    turned = type(targets)(
        top_ids=targets.top_ids.flip(1).int(),
        top_logits=targets.top_logits.flip(1),
        target_ids=targets.target_ids.int(),
        **fields,
    )
    first = sparse_kl(student, identity, targets, torch.ones(6))
    second = sparse_kl(student, identity, turned, torch.ones(6))
    torch.testing.assert_close(first.loss, second.loss)
    assert torch.equal(first.top1, second.top1)
