"""The noise floor: the first traces of a capture once more, kept and spoken of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from captures import TableTeacher, row_over
from click.testing import CliRunner

from teacher_cache.capture.generate import generate
from teacher_cache.capture.noise import PREFIX, Repeats
from teacher_cache.cli.group import cli
from teacher_cache.engines import EngineError, TeacherFacts, TeacherRequest
from teacher_cache.engines.transformers import TransformersTeacher
from teacher_cache.examine import audit as audit_module
from teacher_cache.examine.audit import AuditConfig, audit
from teacher_cache.format import CacheFormatError, open_cache, seal_cache

TINY_TEACHER = Path(__file__).parent.parent / "tools" / "tiny-teacher"


class NoisyTeacher(TableTeacher):
    """The table, whose second answer to the same tokens is another: logits times `scale`."""

    scale = 1.1

    def rows(self, request):
        rows = super().rows(request)
        if request.request_id.startswith(PREFIX):
            for r, last in enumerate(rows.token_ids[rows.first_row - 1 : -1]):
                logits = row_over(int(last)) * self.scale
                logprobs = logits - np.logaddexp.reduce(logits)
                rows.row_logprobs[r] = logprobs[rows.row_ids[r]]
        return rows


def expected_kl(trace, scale, k=8):
    """Per token, over the k most probable ids and one bucket for the rest, entry by entry."""
    found = []
    for last in trace[:-1]:
        row = row_over(int(last))
        top = np.argsort(-row)[:k]
        other = row * scale
        other = other - np.logaddexp.reduce(other)
        p, q = np.exp(row[top]), np.exp(other[top])
        found.append(
            (p * np.log(p / q)).sum() + (1 - p.sum()) * np.log((1 - p.sum()) / (1 - q.sum()))
        )
    return np.array(found)


def test_a_table_has_no_noise_and_the_seal_says_so(capture_config, asked):
    generate(replace(capture_config, limit=4))
    assert open_cache(str(capture_config.out), allow_unsealed=True).manifest.noise is None
    generate(capture_config)
    noise = open_cache(str(capture_config.out)).manifest.noise
    assert 0 <= noise.mean <= noise.p99 <= noise.max < 1e-9
    assert noise.num_traces == 4  # of the first run: the last one wrote two, fewer tokens
    assert len(asked) == 6


def test_the_floor_is_the_kl_of_the_same_tokens_and_audit_speaks_in_it(
    capture_config, asked, monkeypatch
):
    asked.teacher = NoisyTeacher
    generate(capture_config)
    cache = open_cache(str(capture_config.out))
    noise = cache.manifest.noise
    first = list(cache.read_held(cache.traces))[:4]
    # The last token is left out: scoring needs room for one.
    expected = [expected_kl(t.token_ids[t.cot_start - 1 : -1], NoisyTeacher.scale) for t in first]
    assert noise.num_traces == 4
    assert noise.num_tokens == sum(map(len, expected))
    np.testing.assert_allclose(noise.mean, np.concatenate(expected).mean(), rtol=1e-4)
    np.testing.assert_allclose(noise.max, np.concatenate(expected).max(), rtol=1e-4)
    shown = CliRunner().invoke(cli, ["inspect", cache.path])
    assert f"noise floor, KL: mean {noise.mean:.2e}" in shown.output
    monkeypatch.setattr(audit_module, "start_teacher", lambda *_, **__: TableTeacher([]))
    config = AuditConfig(cache=cache.path, model=capture_config.model)
    found = audit(config)
    assert found.noise.mean < noise.mean
    assert found.times_the_floor == pytest.approx(
        found.kl.mean / (found.rounding.mean + noise.mean)
    )
    said = CliRunner().invoke(cli, ["audit", cache.path, "--model", capture_config.model])
    assert f"stored to live is {found.times_the_floor:.3g} times what storing" in said.output


def test_workers_measure_each_for_itself_and_the_seal_pools_them(capture_config, asked):
    class Half(NoisyTeacher):
        scale = 1.05

    noises = []
    for index, teacher in enumerate((NoisyTeacher, Half)):
        asked.teacher = teacher
        generate(replace(capture_config, worker=f"{index}/2"))
        noises.append(len(list((capture_config.out / "noise").iterdir())))
    assert noises == [1, 2]
    noise = seal_cache(capture_config.out).noise
    assert noise.num_traces > 2
    assert expected_kl([5, 6], 1.05).max() < noise.max


def test_a_damaged_measurement_is_named_before_the_seal(capture_config, asked):
    generate(replace(capture_config, limit=2))
    (capture_config.out / "noise" / "w0.json").write_text('{"mean": "x"}')
    with pytest.raises(CacheFormatError, match=r"noise/w0\.json: not a noise floor.*delete it"):
        seal_cache(capture_config.out)


def test_a_trace_without_rows_is_not_repeated():
    assert Repeats().measure(TableTeacher([])) is None


def test_transformers_does_not_repeat_the_computation_that_it_is_compared_with():
    teacher = TransformersTeacher(model=str(TINY_TEACHER), top_k=16)
    repeats = Repeats()
    for rows in teacher.run([TeacherRequest("t", tuple(range(5, 105)) * 3, 0, 0, True)]):
        repeats.keep(rows)
    assert 0 < repeats.measure(teacher).max < 1e-9


class FailingTeacher(TableTeacher):
    """Cannot score what it has generated, as an engine that runs out of memory."""

    def rows(self, request):
        if request.request_id.startswith(PREFIX):
            raise EngineError("out of memory")
        return super().rows(request)


def test_an_engine_that_fails_at_the_noise_floor_does_not_fail_the_capture(
    capture_config, asked, caplog
):
    asked.teacher = FailingTeacher
    assert generate(capture_config).sealed
    assert open_cache(str(capture_config.out)).manifest.noise is None
    assert "noise floor is not known: out of memory" in caplog.text


def test_ids_that_the_model_rules_out_leave_the_noise_a_number_and_the_cache_to_be_sealed(
    capture_config, asked
):
    class Ruling(TableTeacher):
        def rows(self, request):
            rows = super().rows(request)
            rows.row_logprobs[:, -1] = -np.inf
            return rows

    asked.teacher = Ruling
    assert generate(capture_config).sealed
    assert open_cache(str(capture_config.out)).manifest.noise.max == 0


@pytest.mark.parametrize(("num_given", "num_measured"), [(600, 18), (5000, 9)])
def test_traces_after_long_prompts_are_repeated_too(num_given, num_measured):
    teacher, repeats = TableTeacher([]), Repeats()
    for length in (num_given, 20):
        request = TeacherRequest("p", (5,) * length, 20, seed=0, capture_prompt=False)
        repeats.keep(teacher.rows(request))
    assert repeats.measure(teacher).num_tokens == num_measured  # 9 of each that is repeated


class RoundedTeacher(TableTeacher):
    """Says float32, and computes bfloat16."""

    facts = TeacherFacts("table", "1", "bfloat16", "float32", 50, 64)

    def rows(self, request):
        rows = super().rows(request)
        rows.row_logprobs[:] = np.round(rows.row_logprobs * 64) / 64
        return rows


def test_a_head_that_is_not_float32_is_refused_at_the_first_traces(capture_config, asked):
    asked.teacher = RoundedTeacher
    with pytest.raises(EngineError, match="reports a float32 head, but its logits are rounded"):
        generate(capture_config)
    honest = replace(RoundedTeacher.facts, head_dtype="bfloat16")
    asked.teacher = type("Honest", (RoundedTeacher,), {"facts": honest})
    other = replace(capture_config, out=capture_config.out.with_name("honest"))
    assert generate(other).sealed
