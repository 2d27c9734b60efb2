"""Caches that do not tell the teacher's mass outside their entries."""

from student_train.data.traces import TrainingData
from teacher_cache.format import Cache, CacheMismatchError


def require_tails_to_measure(cache: Cache) -> None:
    """Refuse a cache on which no distance from the teacher can be measured.

    Held-out figures are the KL with that mass as one more outcome, whatever the objective is.

    Raises:
        CacheMismatchError: If its tails are placeholders.
    """
    if not cache.header.has_tails:
        raise CacheMismatchError(
            f"{cache.path}: it was imported from rows that do not tell the probability outside "
            "their entries, which held-out figures compare: nothing can be measured on it, with "
            "--tail renormalise neither. Measure on a cache that has its tails; such a one can "
            "be trained on, with --tail renormalise"
        )


def require_tails_to_train(data: TrainingData) -> None:
    """Refuse caches for an objective that compares the tails.

    Raises:
        CacheMismatchError: If there is one whose tails are placeholders.
    """
    for source in data.sources:
        if not source.cache.header.has_tails:
            raise CacheMismatchError(
                f"{source.cache.path}: it was imported from rows that do not tell the probability "
                "outside their entries. Give --tail renormalise, which does without"
            )
