"""Training on rollouts: whose they are and who scored them is checked, and the metrics say it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_cache, make_traces
from students import make_student

from student_train.model.load import model_fingerprint
from student_train.model.save import read_teachers
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import CacheMismatchError
from teacher_cache.format.checksums import DamagedFileError


def own(trace):
    column = np.full(len(trace), np.nan, np.float32)
    column[trace.cot_start :] = -3.5
    return replace(trace, student_logprob=column)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A student that has learned from the teacher `f...`, and makers of caches of its rollouts."""
    folder = tmp_path_factory.mktemp("own")
    given = make_cache(folder / "given", make_traces(8))
    base = make_student(folder / "base")
    first = config_of(given, base, folder / "first")
    student = str(train(first).model)

    def rollouts(name, *, of=student, temperature=1.0, **header):
        facts = {
            "student": of, "student_fingerprint": model_fingerprint(of), "round": 1,
            "tokenizer_fingerprint": "t", "temperature": temperature, "top_p": 1.0,
        }  # fmt: skip
        traces = [own(trace) for trace in make_traces(8, seed=3)]
        return make_cache(folder / name, traces, rollout=facts, **header)

    return given, student, rollouts


def config_of(caches, student, out, **changes):
    caches = caches if isinstance(caches, tuple) else (caches,)
    return TrainConfig(
        cache=caches, student=student, out=out, batch_traces=4, max_steps=2, tracker="none",
        lr=1e-3, **changes,
    )  # fmt: skip


@pytest.mark.slow
def test_metrics_tell_own_tokens_and_how_far_the_student_has_moved(start, tmp_path):
    given, student, rollouts = start
    cache = rollouts("plain")
    metrics = {}
    for match in ("tokens", "samples"):
        config = config_of((given, cache), student, tmp_path / match, match=match)
        metrics[match] = train(config).metrics
        assert 0 < metrics[match]["own_token_share"] < 1
        assert metrics[match]["staleness"] > 0
    assert metrics["tokens"]["clipped_share"] == 0
    card = (tmp_path / "samples/model/README.md").read_text()
    assert "policy gradient on the student's own tokens, ratios clipped at 0.2" in card
    assert read_teachers(str(tmp_path / "samples/model")) == {"f" * 32: "table"}
    plain = train(config_of(given, student, tmp_path / "given")).metrics
    assert "staleness" not in plain


@pytest.mark.parametrize(
    ("of", "header", "changes", "message", "allowed"),
    [
        (None, {"teacher": "other", "teacher_fingerprint": "e" * 32}, {},
         "scored by teacher 'other'.*learned from 'table' .*--other-teacher", "other_teacher"),
        ("base", {}, {}, "those of student .*base.*--stale-rollouts", "stale_rollouts"),
        (None, {"temperature": 0.5}, {"match": "samples"}, "temperature 0.5, top-p 1.0", None),
    ],
)  # fmt: skip
def test_rollouts_of_others_are_refused_unless_allowed(
    start, tmp_path, of, header, changes, message, allowed
):
    _, student, rollouts = start
    chosen = {} if of is None else {"of": make_student(tmp_path / of, seed=1)}
    cache = rollouts(f"refused {message[:9]}", **chosen, **header)
    with pytest.raises(CacheMismatchError, match=message):
        train(config_of(cache, student, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    if allowed is not None:
        train(config_of(cache, student, tmp_path / "run", **changes, **{allowed: True}))
        teachers = {"f" * 32: "table"}
        if "teacher" in header:
            teachers["e" * 32] = "other"
        assert read_teachers(str(tmp_path / "run/model")) == teachers


def test_samples_need_a_cache_of_rollouts(start, tmp_path):
    given, student, _ = start
    with pytest.raises(CacheMismatchError, match="no trace is a student's own"):
        train(config_of(given, student, tmp_path / "run", match="samples"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio_clip": 0.1}, "that of --match samples"),
        ({"match": "samples", "chunk_temperature": 5.0}, "that of --match chunks"),
        ({"match": "samples", "live_teacher": "t"}, "leave one of them out"),
    ],
)
def test_options_that_would_change_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("c", "s", tmp_path, **changes)


def test_a_student_s_record_of_its_teachers_is_checked(start, tmp_path):
    _, student, rollouts = start
    changed = tmp_path / "changed"
    shutil.copytree(student, changed)
    record = changed / "teachers.json"
    record.write_text(record.read_text().replace("f" * 32, "e" * 32))
    with pytest.raises(DamagedFileError, match=r"teachers\.json: damaged"):
        train(config_of(rollouts("damaged"), str(changed), tmp_path / "run"))
