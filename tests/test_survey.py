"""A capture that is resumed renders only what is left, and whatever its table no longer fits."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from captures import TableTeacher, names, write_prompts
from click.testing import CliRunner

from teacher_cache.capture.generate import generate
from teacher_cache.cli.group import cli
from teacher_cache.engines import EngineError, EngineStartError
from teacher_cache.format import open_cache
from teacher_cache.sources import Input, PromptRenderer, SourceError
from teacher_cache.terminal.early_checks import check_out_cache


@pytest.fixture
def rendered(monkeypatch):
    """Ids of the rows that were rendered, in order."""
    found = []
    original = PromptRenderer.__call__

    def render(self, row):
        found.append(row.get("id"))
        return original(self, row)

    monkeypatch.setattr(PromptRenderer, "__call__", render)
    return found


@pytest.fixture
def stopped(capture_config, asked, rendered):
    """A capture whose engine failed after four of six prompts."""
    asked.teacher = lambda requests: TableTeacher(requests, fail_after=4)
    with pytest.raises(EngineError):
        generate(capture_config)
    asked.teacher = TableTeacher
    asked.clear()
    rendered.clear()
    return capture_config


def test_what_is_done_is_not_rendered_again(stopped, asked, rendered):
    report = generate(stopped)
    assert report.sealed
    assert rendered == names(asked) == ["p4", "p5"]
    assert len(open_cache(str(stopped.out))) == 6
    assert not list(stopped.out.glob("survey*"))  # of no use any more


def test_a_capture_whose_engine_never_started_is_begun_again(capture_config, asked, rendered):
    def refuse(requests):
        raise EngineStartError("out of memory")

    asked.teacher = refuse
    with pytest.raises(EngineError, match="out of memory"):
        generate(capture_config)
    asked.teacher = TableTeacher
    rendered.clear()
    check_out_cache(capture_config.out)
    assert generate(capture_config).sealed
    assert rendered[:6] == [f"p{n}" for n in range(6)]  # its model may have been mended meanwhile


def test_another_tokenizer_in_the_same_folder_is_noticed(stopped, asked, rendered):
    file = Path(stopped.model) / "tokenizer.json"
    before = file.read_bytes()
    parts = json.loads(before)
    parts["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(parts))
    try:
        with suppress(SourceError):  # where it makes other content of rows that are done
            generate(stopped)
    finally:
        file.write_bytes(before)  # other tests' model
    assert {"p0", "p1", "p2", "p3"} <= set(rendered)


def test_a_sealed_cache_gets_no_table(capture_config, asked, rendered):
    assert generate(capture_config).sealed
    generate(replace(capture_config, limit=3))
    assert not list(capture_config.out.glob("survey*"))


def test_sealing_by_hand_removes_the_tables_of_all_workers(stopped):
    (stopped.out / "survey-b.bin").write_bytes((stopped.out / "survey.bin").read_bytes())
    ran = CliRunner().invoke(cli, ["seal", str(stopped.out)])
    assert ran.exit_code == 0, ran.output
    assert not list(stopped.out.glob("survey*"))


def test_a_limit_counts_what_is_done(stopped, asked, rendered):
    report = generate(replace(stopped, limit=5))
    assert (report.num_traces, report.sealed) == (1, False)
    assert names(asked) == ["p4"]
    assert report.survey.num_wanted == 6


def test_a_table_of_other_rows_settings_or_bytes_is_not_used(stopped, asked, rendered):
    table = stopped.out / "survey.bin"
    whole = table.read_bytes()
    for data in (whole[:-1], whole[:40] + b"x" + whole[41:], b""):
        table.write_bytes(data)
        generate(replace(stopped, limit=4))
        assert rendered == [f"p{n}" for n in range(6)]
        assert table.read_bytes() == whole  # made again
        rendered.clear()
    write_prompts(stopped.prompts, 7)
    generate(replace(stopped, limit=4))
    assert rendered == [f"p{n}" for n in range(7)]
    assert names(asked) == []


@pytest.mark.slow
def test_a_row_that_changed_is_still_noticed(stopped, rendered):
    rows = [json.loads(line) for line in stopped.prompts.read_text().splitlines()]
    rows[1]["prompt"] = "other"
    stopped.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SourceError, match=r"'p1' is already in .*made from other content"):
        generate(stopped)


def test_rows_left_out_are_listed_again_without_being_rendered(capture_config, asked, rendered):
    lines = capture_config.prompts.read_text().splitlines()
    bad = [json.dumps({"id": "p1", "prompt": "twice"}), json.dumps({"id": "x"}), "no JSON"]
    capture_config.prompts.write_text("\n".join([*lines[:3], *bad, *lines[3:]]) + "\n")
    generate(replace(capture_config, limit=2))
    rejects = (capture_config.out / "rejects.jsonl").read_bytes()
    (capture_config.out / "rejects.jsonl").unlink()
    rendered.clear()
    report = generate(replace(capture_config, limit=4))
    assert (report.survey.num_rejected, report.num_traces) == (3, 2)
    assert (capture_config.out / "rejects.jsonl").read_bytes() == rejects
    assert "x" not in rendered
    assert names(asked) == ["p0", "p1", "p2", "p3"]


def test_several_samples_of_a_prompt_are_resumed_one_by_one(stopped, asked, tmp_path, rendered):
    config = replace(stopped, out=tmp_path / "samples", samples_per_prompt=2)
    generate(replace(config, limit=5))
    asked.clear()
    rendered.clear()
    report = generate(replace(config, limit=8))
    assert names(asked) == ["p2#1", "p3#0", "p3#1"]
    assert rendered[:2] == ["p2", "p3"]
    assert report.num_traces == 3


def test_an_input_is_read_once_to_be_surveyed(capture_config, asked, monkeypatch):
    """And once for the requests: one on the hub is fetched anew each time."""
    num_read = 0
    original = Input.__iter__

    def read(self):
        nonlocal num_read
        for number, row in enumerate(original(self)):
            num_read += number == 1  # not where the first row alone is looked at
            yield row

    monkeypatch.setattr(Input, "__iter__", read)
    generate(replace(capture_config, limit=3))
    assert num_read == 2
    generate(replace(capture_config, limit=4))
    assert num_read == 4
