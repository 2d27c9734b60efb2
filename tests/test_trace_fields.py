"""Further fields of traces from a file, which --where can ask for."""

import json

import pytest
from click.testing import CliRunner
from fakes import make_cache, make_traces
from students import make_student

from student_train.cli.group import cli
from student_train.data.traces import open_data


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", make_traces(12))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(data):
    return [info.trace_id for source in data.sources for info in source.train_infos()]


def test_fields_of_a_file_choose_traces_and_are_part_of_the_fingerprint(cache, tmp_path):
    rows = [{"trace_id": f"t{n}", "score": n} for n in range(12)]
    file = write(tmp_path / "a.jsonl", rows)
    low = open_data([cache], where="score < 5", trace_fields=file)

    assert sorted(ids(low)) == [f"t{n}" for n in range(5)]
    rows[4]["score"] = 9
    other = open_data([cache], where="score < 5", trace_fields=write(tmp_path / "b.jsonl", rows))
    assert low.fingerprint != other.fingerprint != open_data([cache]).fingerprint


def test_a_line_that_names_a_cache_is_for_that_cache_alone(cache, tmp_path):
    other = make_cache(tmp_path / "other", make_traces(12, seed=1))
    fingerprint = open_data([other]).fingerprint
    rows = [
        {"trace_id": f"t{n}", "cache_fingerprint": own, "score": n + shift}
        for own, shift in ((None, 0), (fingerprint, 100))
        for n in range(12)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    data = open_data([cache, other], where="score < 102", trace_fields=file)
    assert [len(source.train) for source in data.sources] == [12, 2]


def test_a_trace_without_a_line_has_no_such_field(cache, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"trace_id": "t3", "score": 1}])
    assert ids(open_data([cache], where="score == 1", trace_fields=file)) == ["t3"]
    with pytest.raises(ValueError, match="cannot be decided for trace"):
        open_data([cache], where="score < 2", trace_fields=file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"trace_id": "t1"}\nno\n', "line 2: expected a JSON object"),
        ('{"id": "t1"}\n', "line 1: expected an object with a trace_id"),
        ("[1]\n", "line 1: expected an object"),
        ('{"trace_id": "t1"}\n{"trace_id": "t1"}\n', "line 2: trace 't1' is already on an earlier"),
    ],
)
def test_lines_that_cannot_be_are_named(cache, tmp_path, text, expected):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=expected):
        open_data([cache], where="score < 2", trace_fields=tmp_path / "a.jsonl")


@pytest.mark.slow
def test_what_profile_writes_chooses_what_run_trains_on(cache, tmp_path):
    student, out = make_student(tmp_path / "student"), tmp_path / "profile"
    common = ["--cache", cache, "--student", student]
    assert CliRunner().invoke(cli, ["profile", *common, "--out", str(out)]).exit_code == 0
    lines = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    bound = lines[5]["rank_surprisal_ratio"]

    where = f"rank_surprisal_ratio <= {bound!r}"
    words = ["run", *common, "--out", str(tmp_path / "run"), "--tracker", "none"]
    words += ["--where", where, "--trace-fields", str(out / "traces.jsonl")]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert "6 traces per epoch" in (tmp_path / "run/model/README.md").read_text()
    write(out / "traces.jsonl", lines[::-1])
    again = CliRunner().invoke(cli, words)
    assert "another run" in str(again.exception)


def test_fields_that_nothing_asks_for_are_refused(cache, tmp_path):
    words = ["run", "--cache", cache, "--student", "s", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, [*words, "--trace-fields", "a.jsonl"])
    assert result.exit_code == 2
    assert "--where" in result.output
