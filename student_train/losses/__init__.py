"""The sparse distillation loss: a linear head and a divergence from cached top-k logits, fused.

`sparse_kl` is the loss, `sparse_kl_of_two` that with two objectives, `sparse_kl_per_token` the same
per token; `TeacherTargets` is their input
from a cache, `SparseKLOutput` their result, and `VocabShard` is for a head whose vocabulary is
split over processes. `chunk_likelihood_loss` matches whole chunks of text instead, for a student
with another tokenizer. `sampled_token_loss` is the policy gradient on a student's own tokens.
`target_ranks` and `outcome_logprobs` only measure. Imports torch and
nothing else.

Shape letters in this package: N loss tokens, C rows of one chunk, D hidden size, V vocabulary,
K kept entries of the widest row; J = K + 1 outcomes, the kept entries and, last, the tail.
"""

from student_train.losses.chunk_likelihood import (
    ChunkTargets,
    chunk_divergence,
    chunk_likelihood_loss,
)
from student_train.losses.outcomes import outcome_logprobs
from student_train.losses.policy_gradient import (
    SampledTokenLoss,
    sampled_token_loss,
    staleness,
    teacher_logprob_of_labels,
)
from student_train.losses.ranks import target_ranks
from student_train.losses.router_balance import router_balance_loss
from student_train.losses.sparse_kl import (
    SparseKLOutput,
    sparse_kl,
    sparse_kl_of_two,
    sparse_kl_per_token,
)
from student_train.losses.targets import TeacherTargets
from student_train.losses.vocab_parallel import VocabShard
from student_train.objective import DEFAULT_OBJECTIVE, DIVERGENCES, TAILS, Objective

__all__ = [
    "DEFAULT_OBJECTIVE",
    "DIVERGENCES",
    "TAILS",
    "ChunkTargets",
    "Objective",
    "SampledTokenLoss",
    "SparseKLOutput",
    "TeacherTargets",
    "VocabShard",
    "chunk_divergence",
    "chunk_likelihood_loss",
    "outcome_logprobs",
    "router_balance_loss",
    "sampled_token_loss",
    "sparse_kl",
    "sparse_kl_of_two",
    "sparse_kl_per_token",
    "staleness",
    "target_ranks",
    "teacher_logprob_of_labels",
]
