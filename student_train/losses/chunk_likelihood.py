"""Approximate likelihood matching: the probability of whole chunks instead of distributions.

For a student with another tokenizer: a chunk is text that both tokenizers write in whole tokens, so
its probability is known of both, as a product over the tokens of either.

Letters: N loss tokens, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The student's negative log-likelihood is at least this, or its logarithm would be infinite.
_LEAST_NATS = 1e-7


@dataclass(frozen=True)
class ChunkTargets:
    """Chunks of some loss tokens.

    Attributes:
        chunk_of: [N] int32 or int64, the chunk that each token is part of; C for none.
        logprob: [C] float, the teacher's logprob of each chunk, at most 0, in nats.
        weight: [C] float, weight of each chunk in the loss.
    """

    chunk_of: Tensor
    logprob: Tensor
    weight: Tensor


def chunk_likelihood_loss(
    ce_N: Tensor,
    token_weight_N: Tensor,
    chunks: ChunkTargets | None,
    *,
    ce_weight: float,
    temperature: float,
) -> Tensor:
    """Weighted sum of the chunks' divergences and the tokens' cross entropies.

        loss = (1 - ce_weight) sum_c weight_c D_c + ce_weight sum_n token_weight_n CE_n

    Args:
        ce_N: [N] the student's cross entropy of each loss token, with its gradient.
        token_weight_N: [N] weight of each token's cross entropy.
        chunks: Chunks of these tokens; all tokens of each are among them. None is allowed where
            there is no token.
        ce_weight: As in `Objective`.
        temperature: As in `chunk_divergence`.

    Raises:
        ValueError: If there are tokens but no chunks.
    """
    ce_loss = ce_weight * (ce_N * token_weight_N).sum()
    if chunks is None:
        if len(ce_N):
            raise ValueError(f"chunks: expected those of {len(ce_N)} tokens, got none")
        return ce_loss
    num_chunks = len(chunks.logprob)
    nats_C = ce_N.new_zeros(num_chunks + 1).index_add(0, chunks.chunk_of, ce_N)[:num_chunks]
    divergence_C = chunk_divergence(-nats_C, chunks.logprob.to(ce_N.dtype), temperature)
    return (1 - ce_weight) * (divergence_C * chunks.weight).sum() + ce_loss


def chunk_divergence(
    student_logprob_C: Tensor, teacher_logprob_C: Tensor, temperature: float
) -> Tensor:
    """Divergence between the probabilities p and q of each chunk under teacher and student.

        D = T KL(a, b) over two outcomes, with a = p^(1/T) and b = q^(1/T)

    as in Minixhofer et al. (arXiv 2503.20083), who leave out the factor T: with it D has a limit,
    A log(A / B) - A + B for A = -log p and B = -log q, and so weighs as much as a divergence over
    tokens does.

    Args:
        student_logprob_C: [C] log q, at most 0.
        teacher_logprob_C: [C] log p, at most 0.
        temperature: T, at least 1; 1 compares the probabilities themselves, which are near 0 for
            long chunks.

    Returns:
        [C] D, in nats.
    """
    a_nats = -teacher_logprob_C / temperature
    b_nats = (-student_logprob_C).clamp(min=_LEAST_NATS) / temperature
    a, not_a = torch.exp(-a_nats), -torch.expm1(-a_nats)
    # Where the teacher is certain the second term is 0, and so must its gradient be.
    ratio = not_a.clamp(min=torch.finfo(not_a.dtype).tiny) / -torch.expm1(-b_nats)
    divergence: Tensor = a * (b_nats - a_nats) + torch.special.xlogy(not_a, ratio)
    return temperature * divergence
