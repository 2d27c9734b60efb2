"""Checks of caches that hold a student's own traces, against the student that is to learn."""

from collections.abc import Mapping

from student_train.data.traces import TrainingData
from student_train.model.load import model_fingerprint
from student_train.model.save import read_teachers
from student_train.run.config import TrainConfig
from teacher_cache.format import Cache, CacheMismatchError


def check_rollouts(config: TrainConfig, data: TrainingData) -> None:
    """Refuse rollouts of another student, by another teacher, or sampled in another way.

    Offline training on a student's own traces has the optimum of training beside a live teacher
    if the teacher is the one that the student has learned from (Lightning OPD, arXiv 2604.13010).

    Raises:
        CacheMismatchError: If a cache does not fit; it says what allows it.
        DamagedFileError: If the student's record of its teachers is damaged.
    """
    caches = [source.cache for source in data.sources]
    own = [cache for cache in caches if cache.header.rollout is not None]
    if config.match == "samples":
        _require_samples(caches, own)
    if not own:
        return
    if config.live_teacher is not None:
        raise CacheMismatchError(
            f"{own[0].path}: it holds a student's own traces, scored already; leave out "
            "--live-teacher, or train on other caches with it"
        )
    if not config.other_teacher:
        _require_known_teacher(config, caches, own)
    if not config.stale_rollouts:
        _require_this_student(config, own)


def taught_by(config: TrainConfig, data: TrainingData) -> dict[str, str]:
    """Fingerprints and names of all teachers that the finished student will have learned from."""
    headers = [source.cache.header for source in data.sources]
    return read_teachers(config.student) | {h.teacher_fingerprint: h.teacher for h in headers}


def _rollout_of(cache: Cache) -> Mapping[str, object]:
    return cache.header.rollout or {}


def _require_samples(caches: list[Cache], own: list[Cache]) -> None:
    if not own:
        raise CacheMismatchError(
            f"{caches[0].path}: no trace is a student's own, which --match samples needs. Let "
            "`train-student rollout` write some and `cache-teacher score` score them"
        )
    for cache in own:
        sampling = {name: _rollout_of(cache).get(name) for name in ("temperature", "top_p")}
        if any(value != 1 for value in sampling.values()):
            how = f"temperature {sampling['temperature']}, top-p {sampling['top_p']}"
            raise CacheMismatchError(
                f"{cache.path}: its rollouts were sampled at {how}; the estimate of --match "
                "samples holds for samples of the student's own distribution: temperature 1, "
                "top-p 1. Roll out again, or take a --divergence"
            )


def _require_known_teacher(config: TrainConfig, caches: list[Cache], own: list[Cache]) -> None:
    known = read_teachers(config.student)
    known |= {
        c.header.teacher_fingerprint: c.header.teacher for c in caches if c.header.rollout is None
    }
    if not known:  # it has learned from none that is recorded: then all rollouts must have one
        known = {own[0].header.teacher_fingerprint: own[0].header.teacher}
    for cache in own:
        if cache.header.teacher_fingerprint not in known:
            raise CacheMismatchError(
                f"{cache.path}: its rollouts were scored by teacher {cache.header.teacher!r} "
                f"(weights {cache.header.teacher_fingerprint[:8]}), and the student learned from "
                f"{_listed(known)}: another teacher pulls it elsewhere, and no further training on "
                "the same rollouts undoes that. Score them with that teacher, or allow it with "
                "--other-teacher"
            )


def _require_this_student(config: TrainConfig, own: list[Cache]) -> None:
    fingerprint = model_fingerprint(config.student)
    for cache in own:
        rollout = _rollout_of(cache)
        if rollout.get("student_fingerprint") != fingerprint:
            raise CacheMismatchError(
                f"{cache.path}: its traces are those of student {rollout.get('student')!r} (files "
                f"{str(rollout.get('student_fingerprint'))[:8]}), not of {config.student!r} as it "
                f"is now ({fingerprint[:8]}). Roll out this student, or allow it with "
                "--stale-rollouts"
            )


def _listed(teachers: Mapping[str, str]) -> str:
    return " and ".join(f"{name!r} ({weights[:8]})" for weights, name in teachers.items())
