"""The teacher in memory beside the student: whole distributions instead of cached entries.

For small teachers, and for one purpose: to measure how much a cache loses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_train.batch.micro_batch import MicroBatch
from student_train.losses import TeacherTargets
from student_train.model.load import check_student, head_of, load_model, output_layer
from teacher_cache.format import CacheHeader, CacheMismatchError

_CHUNK_BYTES = 2**27  # of the teacher's logits; sorting them takes several times as much
_LARGEST_DIFFERENCE = 0.05  # of a probability, on the mean; rounding and other kernels stay below


@dataclass(frozen=True)
class WholeDistributions(TeacherTargets):
    """The teacher's distributions over all ids of the student, formed where rows are selected.

    Those of all rows would take 12 bytes for every token and id, so top_ids and top_logits have
    a shape here and nothing else; `select` gives those of a few rows.

    Attributes:
        hidden_ND: [N, D] outputs of the teacher's body.
        logits_of: The teacher's head: hidden states [C, D] to logits [C, V] of all of its ids.
    """

    hidden_ND: Tensor
    logits_of: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def select(self, rows: slice | Tensor) -> TeacherTargets:
        """The targets of some rows, as in `TeacherTargets`, the likeliest ids first."""
        num_kept = self.top_ids.shape[1]
        logits_CV = self.logits_of(self.hidden_ND[rows])[:, :num_kept]
        top_logits, top_ids = logits_CV.sort(dim=-1, descending=True)
        return TeacherTargets(
            top_ids=top_ids,
            top_logits=top_logits - top_logits[:, :1],
            k=self.k[rows],
            tail_logit=self.tail_logit[rows],
            target_ids=self.target_ids[rows],
        )


class LiveTeacher:
    """The cache's teacher, in memory.

    Raises:
        ValueError: If the model cannot be loaded.
        CacheMismatchError: If it has another tokenizer or another width than a cache's teacher.
    """

    def __init__(
        self, name: str, headers: Sequence[CacheHeader], device: torch.device, *, num_ids: int
    ) -> None:
        """Load it; `num_ids` is the student's number, which may be padded to another width."""
        model, tokenizer = load_model(name, dtype=torch.float32)
        width = output_layer(model).weight.shape[0]
        for header in headers:
            check_student(name, model, tokenizer, header)
            if width != header.vocab_size:
                raise CacheMismatchError(
                    f"live teacher {name!r} has {width} outputs, the cache's teacher "
                    f"{header.teacher!r} {header.vocab_size}"
                )
        self._name = name
        self._num_ids = num_ids
        self._model = model.to(device).eval()
        self._output = output_layer(self._model)
        self._head = head_of(self._model)
        self._is_checked = False

    @torch.no_grad()
    def taught(self, batch: MicroBatch) -> MicroBatch:
        """Replace the batch's targets by the teacher's whole distributions over the student's ids.

        Args:
            batch: Micro-batch in the layout "alone": each row is one trace.

        Raises:
            CacheMismatchError: If the teacher is not the one that the cache was captured from, or
                the cache lacks distributions.
        """
        if batch.num_distributions < batch.num_valid or batch.num_left_out:
            raise CacheMismatchError(
                f"live teacher {self._name!r}: the cache has no distribution for some tokens of "
                "its responses, so nothing says what it loses there; take a cache that has all"
            )
        if not batch.num_valid:
            return batch
        hidden_BTD = self._model.base_model(
            input_ids=batch.input_ids, use_cache=False
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index)
        if not self._is_checked:
            self._check(batch.targets, hidden_ND)
            self._is_checked = True
        num_rows, num_kept = len(hidden_ND), min(self._num_ids, self._output.weight.shape[0])
        targets = WholeDistributions(
            top_ids=batch.targets.top_ids.new_zeros(1).expand(num_rows, num_kept),
            top_logits=hidden_ND.new_zeros(1).expand(num_rows, num_kept),
            k=torch.full_like(batch.targets.k, num_kept),
            tail_logit=self._tail_logit(hidden_ND),
            target_ids=batch.targets.target_ids,
            hidden_ND=hidden_ND,
            logits_of=self._logits,
        )
        return replace(batch, targets=targets)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        logits_CV: Tensor = self._output(hidden_CD)
        if self._head.logit_scale != 1:
            logits_CV *= self._head.logit_scale
        if self._head.softcap is not None:
            logits_CV = self._head.softcap * torch.tanh(logits_CV / self._head.softcap)
        return logits_CV

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        """Slices of rows whose logits are bounded in bytes."""
        size = max(1, _CHUNK_BYTES // (4 * self._output.weight.shape[0]))
        return (slice(first, first + size) for first in range(0, num_rows, size))

    def _tail_logit(self, hidden_ND: Tensor) -> Tensor:
        """[N] mass of the ids that the student lacks, as from a cache; -inf where it lacks none."""
        if self._output.weight.shape[0] <= self._num_ids:
            return hidden_ND.new_full((len(hidden_ND),), -torch.inf)
        found = []
        for rows in self._chunks(len(hidden_ND)):
            logits_CV = self._logits(hidden_ND[rows])
            of_student, beyond = logits_CV[:, : self._num_ids], logits_CV[:, self._num_ids :]
            found.append(beyond.logsumexp(dim=-1) - of_student.logsumexp(dim=-1))
        return torch.cat(found)

    def _check(self, cached: TeacherTargets, hidden_ND: Tensor) -> None:
        """Compare the probabilities of the likeliest tokens with the cached ones."""
        kept = torch.where(cached.kept(), cached.top_logits, -torch.inf)
        inside = torch.nn.functional.logsigmoid(-cached.tail_logit)
        expected = (kept[:, 0] - kept.logsumexp(dim=-1) + inside).exp()
        likeliest = cached.top_ids[:, :1].long()
        found = torch.cat([
            self._logits(hidden_ND[rows]).softmax(dim=-1).gather(1, likeliest[rows])[:, 0]
            for rows in self._chunks(len(hidden_ND))
        ])  # fmt: skip
        difference = float((found - expected).abs()[cached.has_distribution()].mean())
        if not difference <= _LARGEST_DIFFERENCE:
            raise CacheMismatchError(
                f"live teacher {self._name!r} is not the one of the cache: the probabilities of "
                f"the likeliest tokens differ by {difference:.3f} on average, expected at most "
                f"{_LARGEST_DIFFERENCE}"
            )
