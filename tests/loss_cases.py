"""Teachers and students for the tests of the loss."""

from dataclasses import fields, replace

import reference
import torch

from student_train.losses import Objective, TeacherTargets, sparse_kl

# Every objective that is allowed, with a mix away from the default where there is one.
DIVERGENCES = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("combined_kl", 0.3),
    ("jsd", 0.3),
    ("skew_kl", 0.2),
    ("skew_reverse_kl", 0.2),
    ("tvd", None),
]
INFINITE_WITHOUT_TAIL = ("reverse_kl", "combined_kl")


def allowed_objectives():
    for ce_weight in (0.0, 0.3):
        for name, mix in DIVERGENCES:
            common = {"divergence": name, "mix": mix, "ce_weight": ce_weight}
            yield {**common, "tail": "bucket"}
            if name not in INFINITE_WITHOUT_TAIL:
                yield {**common, "tail": "renormalise"}
                yield {**common, "tail": "renormalise", "temperature": 2.0}
        yield {"divergence": "forward_kl", "mix": None, "ce_weight": ce_weight, "tail": "zero"}
    yield {"divergence": "forward_kl", "mix": None, "ce_weight": 1.0, "tail": "bucket"}


def objective_id(objective):
    values = (v for v in objective.values() if v is not None)
    return "-".join(str(v) for v in values)


def targets_of(teacher_logits, k, target_ids=None, dtype=torch.float32):
    """What a cache keeps of dense teacher logits [N, V]; padding holds what must not matter."""
    num_rows = len(teacher_logits)
    k = torch.as_tensor(k).expand(num_rows)
    logits, ids = teacher_logits.double().sort(dim=1, descending=True)
    widest = int(k.max()) if num_rows else 1
    kept = torch.arange(widest) < k[:, None]
    inside = torch.arange(logits.shape[1]) < k[:, None]
    tail_lse = logits.masked_fill(inside, -torch.inf).logsumexp(dim=1)
    kept_lse = logits.masked_fill(~inside, -torch.inf).logsumexp(dim=1)
    return TeacherTargets(
        top_ids=ids[:, :widest].masked_fill(~kept, -1),
        top_logits=(logits - logits[:, :1])[:, :widest].masked_fill(~kept, torch.nan).to(dtype),
        k=k,
        tail_logit=(tail_lse - kept_lse).masked_fill(k == logits.shape[1], -3.0).to(dtype),
        target_ids=ids[:, 0] if target_ids is None else torch.as_tensor(target_ids),
    )


def ragged_case(dtype=torch.float64, num_vocab=7, hidden_size=3, seed=0, most_kept=None):
    """Rows with k = 1, ragged, V - 1 and V, the realised id inside and outside, one weight 0.

    `most_kept` stands in for V where rows are to keep fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    most = num_vocab if most_kept is None else most_kept
    k = [1, 1, 3, 3, most - 1, most - 1, most, 2]
    teacher = torch.randn(len(k), num_vocab, generator=generator, dtype=torch.float64) * 1.5
    order = teacher.argsort(dim=1, descending=True)
    realised = [order[n, place] for n, place in enumerate([0, 4, 2, 5, 1, num_vocab - 1, 3, 0])]
    targets = targets_of(teacher, k, torch.stack(realised), dtype=torch.float64)
    hidden = torch.randn(len(k), hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_vocab, hidden_size, generator=generator, dtype=torch.float64)
    token_weight = torch.tensor([0.5, 1, 0.25, 0, 1.5, 1, 0.75, 0.125], dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, token_weight


def without_distributions(targets, rows):
    """The same targets, with some rows that have the target token alone."""
    k, top_ids, top_logits = targets.k.clone(), targets.top_ids.clone(), targets.top_logits.clone()
    k[rows], tail_logit = 0, targets.tail_logit.clone()
    top_ids[rows, 0], top_logits[rows, 0] = targets.target_ids[rows], 0.0
    tail_logit[rows] = 0.0
    return replace(targets, k=k, top_ids=top_ids, top_logits=top_logits, tail_logit=tail_logit)


def as_dtype(targets, dtype):
    return replace(
        targets, top_logits=targets.top_logits.to(dtype), tail_logit=targets.tail_logit.to(dtype)
    )


def on_device(targets, device):
    """The same teacher on another device."""
    values = {item.name: getattr(targets, item.name).to(device) for item in fields(targets)}
    return TeacherTargets(**values)


def distillation_case(dtype, distance, sharpness, *, num_vocab=1003, seed=0):
    """Operands in dtype, and a teacher at about this KL from the student before sharpening."""
    num_rows, hidden_size = 48, 32
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_vocab, hidden_size, generator=generator, dtype=torch.float64)
    hidden, weight = hidden.to(dtype), (weight * 3 / hidden_size**0.5).to(dtype)
    logits = hidden.double() @ weight.double().T
    noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    k = torch.randint(1, 65, (num_rows,), generator=generator)
    # A second-order expansion: noise of variance v is a KL of v / 2.
    targets = targets_of(logits + (2 * distance) ** 0.5 * noise, k)
    return hidden, (weight.double() * sharpness).to(dtype), targets


def errors_and_yardstick(hidden, weight, targets):
    """Relative errors of our losses and their two gradients, and what each may be at most.

    The yardstick is the plain formula in the same dtype on the same device.
    """
    token_weight = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)

    def plain(hidden, weight):
        losses = reference.plain_bucket_kl((hidden @ weight.T).float(), targets)
        return losses, losses.mean()

    def plain_float64(hidden, weight):
        losses = reference.plain_bucket_kl(hidden @ weight.T, targets)
        return losses, losses.mean()

    def ours(hidden, weight):
        output = sparse_kl(hidden, weight, targets, token_weight, Objective(ce_weight=0.0))
        return output.kl, output.loss

    truth = _losses_and_gradients(plain_float64, hidden.double(), weight.double())
    yardstick = _relative_errors(_losses_and_gradients(plain, hidden, weight), truth)
    errors = _relative_errors(_losses_and_gradients(ours, hidden, weight), truth)
    return errors, [2 * error + torch.finfo(hidden.dtype).eps / 4 for error in yardstick]


def _losses_and_gradients(function, hidden, weight):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    losses, loss = function(hidden, weight)
    return [losses.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def _relative_errors(values, truths):
    return [
        float((value.double() - truth).norm() / truth.norm())
        for value, truth in zip(values, truths, strict=True)
    ]
