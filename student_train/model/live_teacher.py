"""The teacher in memory beside the student: whole distributions instead of cached entries.

For small teachers, and for one purpose: to measure how much a cache loses.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from student_train.batch.micro_batch import MicroBatch
from student_train.losses import TeacherTargets
from student_train.model.load import check_student, load_model, output_layer
from teacher_cache.format import CacheHeader, CacheMismatchError

_LARGEST_DIFFERENCE = 0.05  # of a probability, on the mean; rounding and other kernels stay below


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
        logits_BTV = self._model(input_ids=batch.input_ids, use_cache=False).logits
        logits_NV = logits_BTV.flatten(0, 1).index_select(0, batch.hidden_index).float()
        of_student, beyond = logits_NV[:, : self._num_ids], logits_NV[:, self._num_ids :]
        top_logits, top_ids = of_student.sort(dim=-1, descending=True)
        if not self._is_checked:
            self._check(batch.targets, logits_NV)
            self._is_checked = True
        targets = TeacherTargets(
            top_ids=top_ids,
            top_logits=top_logits - top_logits[:, :1],
            k=torch.full_like(batch.targets.k, top_ids.shape[1]),
            # Mass of the ids that the student lacks, as from a cache; -inf where it lacks none.
            tail_logit=beyond.logsumexp(dim=-1) - of_student.logsumexp(dim=-1),
            target_ids=batch.targets.target_ids,
        )
        return replace(batch, targets=targets)

    def _check(self, cached: TeacherTargets, logits_NV: Tensor) -> None:
        """Compare the probabilities of the likeliest tokens with the cached ones."""
        kept = torch.where(cached.kept(), cached.top_logits, -torch.inf)
        inside = torch.nn.functional.logsigmoid(-cached.tail_logit)
        expected = (kept[:, 0] - kept.logsumexp(dim=-1) + inside).exp()
        found = logits_NV.softmax(dim=-1).gather(1, cached.top_ids[:, :1].long())[:, 0]
        difference = float((found - expected).abs()[cached.has_distribution()].mean())
        if not difference <= _LARGEST_DIFFERENCE:
            raise CacheMismatchError(
                f"live teacher {self._name!r} is not the one of the cache: the probabilities of "
                f"the likeliest tokens differ by {difference:.3f} on average, expected at most "
                f"{_LARGEST_DIFFERENCE}"
            )
