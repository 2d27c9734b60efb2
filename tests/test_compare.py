"""Comparisons of runs: what the page says is what their folders hold, or an error says why not."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from student_train.cli.group import cli
from student_train.compare.answers import paired_answers
from student_train.compare.runs import differing_settings, read_run
from student_train.evaluation.completions import Completion, Sample, completion_log
from student_train.evaluation.intervals import Mean
from student_train.evaluation.prompts import prompts_fingerprint, read_prompts
from student_train.run.config import TrainConfig
from teacher_cache.format.checksums import DamagedFileError, publish_record

STRANGER = "</pre><img src=x onerror=alert(1)>"
NUM_PROMPTS = 40


def make_prompts(path):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_completions(file, right, prompts_file, *, samples_per_prompt=1, **settings):
    """An evaluation's file; `right` says of every prompt whether its samples are right."""
    known = {
        "model": str(file), "num_prompts": NUM_PROMPTS, "checker": "numbers",
        "samples_per_prompt": samples_per_prompt, "max_new_tokens": 99,
        "prompts": prompts_fingerprint(list(read_prompts(prompts_file))),
    }  # fmt: skip
    with completion_log(file, {**known, **settings}, force=True) as log:
        for prompt, is_right in enumerate(right):
            for sample in range(samples_per_prompt):
                text = f"{STRANGER} answer {prompt}"
                log.add(
                    Sample(
                        prompt=prompt, sample=sample, group=None, found=str(prompt),
                        right=bool(is_right), compared_as="number", closed=True,
                        completion=Completion(text, 7, finished=True),
                    )
                )  # fmt: skip


def make_run(folder, *, lead_span, steps=40, finished=True, heldout="h" * 8):
    config = TrainConfig(cache=("cache",), student="s", out=folder, lead_span=lead_span)
    folder.mkdir(parents=True)
    record = {"leadspan_run": 1, "config": config.to_json(), "cache_fingerprint": "c" * 8}
    record |= {"student_fingerprint": "s" * 8, "heldout_fingerprint": heldout, "snapshots": []}
    publish_record(folder / "config.json", record)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 1 / step, "flops": step * 10**9 * lead_span}
            line |= {"tokens_trained": step * 100, "bytes_read": step * 1000, "train_s": step * 1.5}
            if step % 10 == 0:
                line |= {"heldout_kl": 2 / step, "heldout_kl_cot": 3 / step}
            file.write(json.dumps(line) + "\n")
    if finished:
        publish_record(folder / "result.json", {"metrics": {}})
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs; of the second's answers three flip to wrong and one to right."""
    prompts = make_prompts(tmp_path / "prompts.jsonl")
    right = [n % 4 != 0 for n in range(NUM_PROMPTS)]
    flipped = [not is_right if n in (1, 2, 3, 4) else is_right for n, is_right in enumerate(right)]
    whole = make_run(tmp_path / "whole", lead_span=1.0)
    half = make_run(tmp_path / "half", lead_span=0.5)
    make_completions(whole / "completions.jsonl", right, prompts)
    make_completions(half / "completions.jsonl", flipped, prompts)
    return whole, half, prompts


def invoke(*args, exit_code=0):
    result = CliRunner().invoke(cli, ["compare", *map(str, args)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def test_answers_are_paired_prompt_by_prompt(runs):
    whole, half, _ = runs
    first, second = paired_answers([read_run(whole), read_run(half)])

    assert first.difference is None
    assert [flip.prompt for flip in second.lost] == [1, 2, 3]
    assert [flip.prompt for flip in second.gained] == [4]
    assert second.difference.value == pytest.approx(-2 / NUM_PROMPTS)
    assert second.difference.interval[0] < -2 / NUM_PROMPTS < second.difference.interval[1]
    assert first.accuracy.num_right - second.accuracy.num_right == 2


def test_a_prompt_flips_where_most_of_its_samples_do(runs, tmp_path):
    whole, half, prompts = runs
    for folder, right in ((whole, [True] * NUM_PROMPTS), (half, [n > 0 for n in range(40)])):
        make_completions(folder / "completions.jsonl", right, prompts, samples_per_prompt=3)
    _, second = paired_answers([read_run(whole), read_run(half)])

    assert [flip.prompt for flip in second.lost] == [0]
    assert second.difference.value == pytest.approx(-1 / NUM_PROMPTS)


def test_the_page_shows_curves_flips_and_what_differs(runs, tmp_path):
    whole, half, prompts = runs
    out = tmp_path / "page.html"
    invoke(whole, half, "--prompts", prompts, "-o", out)
    page = out.read_text()

    for words in (
        "KL on held-out traces by computation", "lead_span", ">0.5<", ">1.0<", "40.0 GFLOP",
        "Right before, wrong now: 3", "Wrong before, right now: 1", "2 + 1?", "right is 3",
        "-5.0", "&lt;/pre&gt;&lt;img src=x", "0.0500", "0.0750",
    ):  # fmt: skip
        assert words in page, words
    assert "<img" not in page
    assert "different held-out traces" not in page
    assert page.count('class="flip"') == 4


def test_fewer_flips_are_shown_than_there_are_only_with_a_word(runs, tmp_path):
    whole, half, _ = runs
    invoke(whole, half, "--flips", 1, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()

    assert "Right before, wrong now: 3 (the first 1 are shown)" in page
    assert page.count('class="flip"') == 2


def test_runs_without_answers_or_at_work_are_compared_as_far_as_they_are(tmp_path):
    first = make_run(tmp_path / "a", lead_span=1.0)
    second = make_run(tmp_path / "b", lead_span=0.5, finished=False, heldout="other")
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # the next line, half written
    invoke(first, second, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()

    assert "Fewer than two of the runs have evaluated answers" in page
    assert "40, not finished" in page
    assert "different held-out traces" in page


def test_a_run_with_two_files_of_completions_has_the_answers_of_each(runs, tmp_path):
    whole, _, prompts = runs
    files = [tmp_path / "none.jsonl", tmp_path / "all.jsonl"]
    for file, right in zip(files, (False, True), strict=True):
        make_completions(file, [right] * NUM_PROMPTS, prompts)
    page = tmp_path / "page.html"
    invoke(whole, whole, "--completions", files[0], "--completions", files[1], "-o", page)

    shares = re.findall(r"<td>([0-9.]+ %) \([^)]* to [^)]*\)</td>", page.read_text())
    assert shares == ["0 %", "100 %"]


def test_cells_of_a_sweep_are_compared_with_the_untrained_student(runs, tmp_path):
    _, _, prompts = runs
    cell = tmp_path / "cells" / "span-1"
    make_run(cell / "run", lead_span=1.0)
    base = tmp_path / "cells" / "base"
    base.mkdir()
    for folder in (cell, base):
        make_completions(folder / "completions.jsonl", [True] * NUM_PROMPTS, prompts)
    found = [read_run(base), read_run(cell)]

    assert found[0].settings == {}
    assert differing_settings(found) == {}
    assert paired_answers(found)[1].difference == Mean.of(np.zeros((1, NUM_PROMPTS)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_new_tokens": 50}, "max_new_tokens: 50, there 99"),
        ({"prompts": "others"}, "prompts: 'others'"),
        ({"checker": "math"}, "checker: 'math'"),
    ],
)
def test_answers_that_were_asked_for_differently_are_not_paired(runs, tmp_path, changed, words):
    whole, half, prompts = runs
    make_completions(half / "completions.jsonl", [True] * NUM_PROMPTS, prompts, **changed)
    done = invoke(whole, half, "-o", tmp_path / "page.html", exit_code=1)

    assert words in str(done.exception)
    assert not (tmp_path / "page.html").exists()


def test_mistakes_are_told_before_anything_is_written(runs, tmp_path):
    whole, half, prompts = runs
    out = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    cases = [
        ([whole, tmp_path / "empty"], 1, "found neither"),
        ([whole, tmp_path / "none"], 1, "no such folder"),
        ([whole], 2, "at least two folders"),
        ([whole, half, "--completions", "x"], 2, "one file for each of 2 runs"),
        ([whole, half, "--prompts", tmp_path / "prompts2.jsonl"], 1, "not the prompts that"),
    ]
    rows = prompts.read_text().replace("1 + 1?", "something else")
    (tmp_path / "prompts2.jsonl").write_text(rows)
    for args, exit_code, words in cases:
        done = invoke(*args, "-o", out, exit_code=exit_code)
        assert words in f"{done.exception} {done.output}"
        assert not out.exists()


def test_runs_that_failed_or_are_at_work_are_shown_as_far_as_they_are(runs, tmp_path):
    whole, half, prompts = runs
    failed = make_run(tmp_path / "failed", lead_span=0.5, steps=0, finished=False, heldout="other")
    lines = (half / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (half / "completions.jsonl").write_bytes(b"".join(lines[:-1]))
    invoke(whole, half, failed, "--prompts", prompts, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()

    assert "not finished: 39 of 40 answers" in page
    assert "<td>0, not finished</td>" in page
    assert "Fewer than two of the runs have evaluated answers" in page
    assert "different held-out traces" not in page  # it was never measured
    assert page.count(f"{failed}</li>") == 0  # no legend without a curve
    assert page.count(f"{half}</li>") == 3


def test_damaged_completions_are_refused(runs):
    _, half, _ = runs
    file = half / "completions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines).replace(b'"right": true', b'"right": null', 1))
    with pytest.raises(DamagedFileError, match="damaged since it was written"):
        read_run(half)


def test_prompts_that_cannot_be_shown_are_refused(runs, tmp_path):
    whole, half, prompts = runs
    missing = invoke(whole, half, "--prompts", tmp_path / "no", "-o", tmp_path / "x", exit_code=1)
    assert "--prompts" in str(missing.exception)
    for run in (whole, half):
        (run / "completions.jsonl").unlink()
    unused = invoke(whole, half, "--prompts", prompts, "-o", tmp_path / "x", exit_code=1)
    assert "no run has all the completions" in str(unused.exception)


@pytest.mark.parametrize("damaged", ['{"step": ,', '7\n{"step": 7,', '{"step": "seven",'])
def test_a_damaged_line_of_metrics_is_named(runs, damaged):
    whole, _, _ = runs
    text = (whole / "metrics.jsonl").read_text().replace('{"step": 7,', damaged)
    (whole / "metrics.jsonl").write_text(text)

    with pytest.raises(ValueError, match=r"metrics.jsonl:7: expected a line of metrics"):
        read_run(whole)
