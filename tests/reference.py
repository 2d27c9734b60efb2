"""Slow definitions in float64, written from the formulas and dense means; autograd differentiates.

Nothing here is shared with, or taken from, the code under test.
"""

import torch


def student_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def kl(p, q):
    """sum p log(p / q) with 0 log 0 = 0; p and q need not sum to one."""
    p, q = p[p > 0], q[p > 0]
    return (p * (p.log() - q.log())).sum()


def divergence(name, mix, p, q):
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "combined_kl":
        return mix * kl(p, q) + (1 - mix) * kl(q, p)
    if name == "jsd":
        m = mix * p + (1 - mix) * q
        return mix * kl(p, m) + (1 - mix) * kl(q, m)
    if name == "skew_kl":
        return kl(p, mix * p + (1 - mix) * q)
    if name == "skew_reverse_kl":
        return kl(q, mix * q + (1 - mix) * p)
    assert name == "tvd"
    return 0.5 * (p - q).abs().sum()


def teacher_probs(top_logits, tail_logit, tail, temperature):
    """Outcomes of one token: kept entries, then the tail."""
    kept = (top_logits / temperature).exp()
    kept = kept / kept.sum()
    tail_mass = torch.sigmoid(tail_logit)
    zero = torch.zeros(1, dtype=kept.dtype)
    if tail == "renormalise":
        return torch.cat([kept, zero])
    kept = kept * (1 - tail_mass)
    return torch.cat([kept, tail_mass.reshape(1) if tail == "bucket" else zero])


def token_parts(logits, targets, n, name, mix, tail, temperature):
    """Divergence, times the squared temperature, and cross entropy of token n."""
    k, num_vocab = int(targets.k[n]), logits.shape[1]
    ce = -torch.log_softmax(logits[n], dim=0)[targets.target_ids[n].long()]
    if k == 0:  # no distribution
        return torch.zeros_like(ce), ce
    ids = targets.top_ids[n, :k].long()
    rest = torch.ones(num_vocab, dtype=torch.bool)
    rest[ids] = False
    q = torch.softmax(logits[n] / temperature, dim=0)
    q = torch.cat([q[ids], q[rest].sum().reshape(1)])
    tail_logit = targets.tail_logit[n].double()
    if k == num_vocab:  # nothing is left that could be a tail
        tail_logit = torch.tensor(-torch.inf, dtype=torch.float64)
    p = teacher_probs(targets.top_logits[n, :k].double(), tail_logit, tail, temperature)
    if k == num_vocab or (tail == "zero" and name == "forward_kl"):
        p, q = p[:k], q[:k]
    return divergence(name, mix, p, q) * temperature**2, ce


def sparse_kl(
    hidden,
    weight,
    targets,
    *,
    ce_weight,
    bias=None,
    divergence="forward_kl",
    mix=None,
    tail="bucket",
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
):
    """[N] losses."""
    logits = student_logits(hidden, weight, bias, softcap, logit_scale)
    losses = []
    for n in range(len(hidden)):
        value, ce = token_parts(logits, targets, n, divergence, mix, tail, temperature)
        losses.append((1 - ce_weight) * value + ce_weight * ce)
    return torch.stack(losses) if losses else logits.sum(dim=1)


def plain_bucket_kl(logits, targets):
    """[N] forward KL with a bucket as it is commonly written, in the dtype of the logits.

    The yardstick of accuracy: dense log-softmax, tail by log-sum-exp over the masked rest.
    """
    kept = torch.arange(targets.top_ids.shape[1], device=logits.device) < targets.k[:, None]
    log_q = torch.log_softmax(logits, dim=1)
    masked = log_q.clone()
    for n, k in enumerate(targets.k.tolist()):
        masked[n, targets.top_ids[n, :k].long()] = -torch.inf
    log_q_tail = masked.logsumexp(dim=1)
    top = targets.top_logits.to(logits.dtype).masked_fill(~kept, -torch.inf)
    tail_logit = targets.tail_logit.to(logits.dtype)
    log_p = torch.log_softmax(top, dim=1)
    log_p = log_p + torch.nn.functional.logsigmoid(-tail_logit)[:, None]
    log_q_kept = log_q.gather(1, targets.top_ids.long().clamp(min=0))
    terms = torch.where(kept, log_p.exp() * (log_p - log_q_kept), 0.0)
    log_p_tail = torch.nn.functional.logsigmoid(tail_logit)
    return terms.sum(dim=1) + log_p_tail.exp() * (log_p_tail - log_q_tail)


def trace_losses(logits, trace, ce_weight):
    """[N] losses of a trace's tokens that have entries; logits [T, V] of all its tokens, in order.

    Kept ids that the logits do not reach are part of the tail. Tokens of the response without
    entries have the share ce_weight of their cross entropy, if there is one.
    """
    losses, begin = [], 0
    for t, k in enumerate(trace.k.tolist()):
        ids = torch.from_numpy(trace.top_ids[begin : begin + k]).long()
        top_logits = torch.from_numpy(trace.top_logits[begin : begin + k]).double()
        begin += k
        if k == 0:
            if t >= max(1, trace.cot_start) and ce_weight:
                ce = -torch.log_softmax(logits[t - 1].double(), dim=0)[int(trace.token_ids[t])]
                losses.append(ce_weight * ce)
            continue
        tail_logit = torch.tensor(float(trace.tail_logit[t]), dtype=torch.float64)
        *kept, tail = teacher_probs(top_logits, tail_logit, "bucket", 1.0)
        held = ids < logits.shape[1]
        kept = torch.stack(kept)
        p = torch.cat([kept[held], (tail + kept[~held].sum()).reshape(1)])
        q = torch.softmax(logits[t - 1].double(), dim=0)
        rest = torch.ones(len(q), dtype=torch.bool)
        rest[ids[held]] = False
        divergence = kl(p, torch.cat([q[ids[held]], q[rest].sum().reshape(1)]))
        ce = -q[int(trace.token_ids[t])].log()
        losses.append((1 - ce_weight) * divergence + ce_weight * ce)
    return torch.stack(losses)
