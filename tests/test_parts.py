"""`--worker i/n`: one input shared by processes that do not talk, and a seal that knows of them."""

import itertools
import json
from dataclasses import replace

import pytest
from caches import read_all
from captures import TableTeacher, names, write_prompts
from commands import arguments, invoke, write_rows
from forked import CACHE_TEACHER, Forked
from small_teachers import make_small_model

from teacher_cache.capture.generate import generate
from teacher_cache.cli.report_text import report_line
from teacher_cache.engines import EngineError
from teacher_cache.format import CacheMismatchError, InputShare, open_cache, seal_cache
from teacher_cache.format.shares import parse_worker


def test_every_row_is_exactly_one_workers_whatever_rows_there_are():
    rows = [f"p{n}" for n in range(1000)]
    parts = [[row for row in rows if InputShare(7, i).holds(row)] for i in range(7)]
    assert sorted(itertools.chain(*parts)) == sorted(rows)
    assert all(100 < len(part) < 190 for part in parts)
    assert [row for row in rows if InputShare(3, 0).holds(row)][:5] == [
        "p1",
        "p7",
        "p13",
        "p14",
        "p17",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3/8", ("w3of8", InputShare(8, 3))),
        ("0/1", ("w0of1", InputShare(1, 0))),
        ("a_b", ("a_b", None)),
    ],
)
def test_a_worker_is_a_part_or_a_name(text, expected):
    assert parse_worker(text) == expected


@pytest.mark.parametrize("text", ["8/8", "-1/8", "1/0", "a/3", "/", "1/2/3", "w3of8"])
def test_what_is_neither_is_refused(capture_config, text):
    with pytest.raises(ValueError, match="worker: "):
        replace(capture_config, worker=text)


def test_parts_are_disjoint_and_together_everything(capture_config, asked):
    write_prompts(capture_config.prompts, 40)
    reports = [generate(replace(capture_config, worker=f"{i}/3")) for i in range(3)]
    assert sorted(names(asked)) == sorted(f"p{n}" for n in range(40))
    assert sum(report.num_traces for report in reports) == 40
    assert not any(report.sealed for report in reports)
    assert "2 of 3 are still to come (1/3, 2/3)" in report_line(reports[0], "c")
    assert "as are all others: `cache-teacher seal c`" in report_line(reports[2], "c")
    assert seal_cache(capture_config.out).seal.num_duplicates == 0
    assert len(read_all(open_cache(str(capture_config.out)))) == 40


def test_the_samples_of_a_prompt_are_one_workers(capture_config, asked):
    generate(replace(capture_config, worker="1/2", samples_per_prompt=3))
    prompts = {name.partition("#")[0] for name in names(asked)}
    assert 0 < len(prompts) < 6
    assert len(asked) == 3 * len(prompts)


def test_the_limit_is_that_of_all_workers_together(capture_config, asked):
    for i in range(2):
        generate(replace(capture_config, worker=f"{i}/2", limit=4))
    assert sorted(names(asked)) == ["p0", "p1", "p2", "p3"]
    assert seal_cache(capture_config.out).seal.num_traces == 4


def test_a_worker_without_rows_starts_no_teacher_and_counts_as_finished(capture_config, asked):
    write_prompts(capture_config.prompts, 1)
    idle = next(i for i in range(2) if not InputShare(2, i).holds("p0"))
    asked.teacher = None  # would fail when called
    report = generate(replace(capture_config, worker=f"{idle}/2"))
    assert (report.num_traces, report.survey.num_wanted) == (0, 0)
    asked.teacher = TableTeacher
    generate(replace(capture_config, worker=f"{1 - idle}/2"))
    assert seal_cache(capture_config.out).seal.num_traces == 1


def test_the_seal_names_the_workers_that_have_not_finished(capture_config, asked):
    write_prompts(capture_config.prompts, 40)
    generate(replace(capture_config, worker="0/3"))
    asked.teacher = lambda requests: TableTeacher(requests, fail_after=2)
    with pytest.raises(EngineError):
        generate(replace(capture_config, worker="2/3"))
    with pytest.raises(
        CacheMismatchError,
        match=r"worker 1/3 has not started, 2/3 has not finished. Run these .*--allow-missing",
    ):
        seal_cache(capture_config.out)
    assert seal_cache(capture_config.out, allow_missing=True).seal.num_traces < 40


def test_a_worker_that_finished_less_than_the_others_is_noticed(capture_config, asked):
    for i in range(2):
        generate(replace(capture_config, worker=f"{i}/2", limit=3))
    generate(replace(capture_config, worker="0/2"))
    with pytest.raises(CacheMismatchError, match="worker 1/2 took on another input, of 3 traces"):
        seal_cache(capture_config.out)
    generate(replace(capture_config, worker="1/2"))
    assert seal_cache(capture_config.out).seal.num_traces == 6


def test_another_number_of_workers_may_finish_what_was_begun(capture_config, asked):
    write_prompts(capture_config.prompts, 40)
    generate(replace(capture_config, worker="0/3"))
    asked.clear()
    for i in range(2):
        generate(replace(capture_config, worker=f"{i}/2"))
    assert len(asked) == 40 - sum(InputShare(3, 0).holds(f"p{n}") for n in range(40))
    assert seal_cache(capture_config.out).seal.num_traces == 40


def test_a_worker_that_takes_on_everything_seals_by_itself(capture_config, asked):
    generate(replace(capture_config, worker="0/3"))
    assert generate(capture_config).sealed


@pytest.mark.slow
def test_three_processes_at_once_make_one_cache(tmp_path):
    small_model = tmp_path / "model"
    small_model.mkdir()
    make_small_model(small_model)
    rows = [{"id": f"p{n}", "prompt": f"a {n} b"} for n in range(30)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    calls = [arguments(small_model, prompts, whole)]
    calls += [arguments(small_model, prompts, shared, "--worker", f"{i}/3") for i in range(3)]
    running = [Forked(CACHE_TEACHER, *call) for call in calls]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    invoke("seal", shared)
    seal = json.loads((shared / "cache.json").read_text())["seal"]
    assert (seal["num_traces"], seal["num_duplicates"]) == (30, 0)
    expected = read_all(open_cache(str(whole)))
    for name, trace in read_all(open_cache(str(shared))).items():
        assert trace.token_ids.tolist() == expected[name].token_ids.tolist()
        assert trace.top_logits.tolist() == expected[name].top_logits.tolist()
