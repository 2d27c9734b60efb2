"""cache-teacher as a user meets it: real processes, a real small model, one line per mistake."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches import read_all
from commands import arguments, invoke, write_rows
from forked import CACHE_TEACHER, Forked, run_forked
from small_teachers import CONTEXT, make_small_model

from teacher_cache.cli import COMMAND_LINE
from teacher_cache.cli.group import cli
from teacher_cache.format import open_cache
from teacher_cache.terminal.entry import CommandLine, run_command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_small_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": f"p{n}", "prompt": f"a {n} b", "answer": str(n)} for n in range(8)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def test_every_command_has_help_with_an_example():
    for name, command in cli.commands.items():
        assert f"cache-teacher {name} " in command.get_help(click.Context(command))


@pytest.mark.slow
def test_generate_inspect_export_and_score_agree(model, prompts, tmp_path):
    said = invoke(*arguments(model, prompts, tmp_path / "cache", "--capture-prompt"))
    assert "8 traces captured now" in said
    assert "complete and sealed" in said
    assert "no errors" in invoke("verify", tmp_path / "cache")
    assert "passed: mean KL" in invoke("audit", tmp_path / "cache", "--model", model)
    figures = json.loads(invoke("inspect", tmp_path / "cache", "--json"))
    assert (figures["num_traces"], figures["header"]["top_k"], figures["sealed"]) == (8, 6, True)
    shown = invoke("inspect", tmp_path / "cache", "--trace", "p3", "--tokens", "0:2")
    assert "trace p3 (" in shown
    assert '{"answer": "3"}' in shown
    assert "-- prompt, 3 tokens\na 3 b\n" in shown
    assert len(re.findall(r"^ +\d prompt ", shown, re.MULTILINE)) == 2
    invoke("export", tmp_path / "cache", tmp_path / "traces.jsonl", "--text")
    row = json.loads((tmp_path / "traces.jsonl").read_text().splitlines()[0])
    assert row["text"].startswith("a 0 b")
    invoke(
        *("score", "--engine", "transformers", "--model", model, "--top-k", 6),
        *("--traces", tmp_path / "traces.jsonl", "--out", tmp_path / "scored"),
    )
    generated = read_all(open_cache(str(tmp_path / "cache")))
    scored = read_all(open_cache(str(tmp_path / "scored")))
    assert sorted(generated) == sorted(scored)
    for name, trace in generated.items():
        np.testing.assert_array_equal(trace.token_ids, scored[name].token_ids)
        np.testing.assert_array_equal(trace.top_ids, scored[name].top_ids)
        np.testing.assert_allclose(trace.top_logits, scored[name].top_logits, atol=1 / 30)


def test_a_table_of_conversations_is_scored_and_its_bad_rows_listed(model, tmp_path):
    turns = [
        [{"from": "human", "value": f"a {n}"}, {"from": "gpt", "value": f"<think> b </think> {n}"}]
        for n in range(3)
    ]
    turns.append(turns[0][:1])
    table = pa.table({"uuid": ["u0", "u1", "u2", "u3"], "conversations": turns})
    pq.write_table(table, tmp_path / "traces.parquet")
    call = ("score", "--engine", "transformers", "--model", model, "--top-k", 6)
    files = ("--traces", tmp_path / "traces.parquet", "--out", tmp_path / "cache")
    said = invoke(*call, *files, "--id-field", "uuid", "--slice", "lead:0.9")
    assert "3 traces captured now" in said
    assert "1 rows left out" in said
    (reject,) = (tmp_path / "cache" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["id"] == "u3"
    assert json.loads(reject)["reason"] == "no-assistant-turn"
    assert invoke("verify", tmp_path / "cache")
    assert sorted(read_all(open_cache(str(tmp_path / "cache")))) == ["u0", "u1", "u2"]


def test_a_trial_run_estimates_the_whole_and_can_be_sealed(model, prompts, tmp_path):
    said = invoke(*arguments(model, prompts, tmp_path / "cache", "--limit", 3))
    assert "not complete yet" in said
    assert "3 traces are too few to estimate all 8" in said
    assert "3 traces" in invoke("seal", tmp_path / "cache")
    assert len(open_cache(str(tmp_path / "cache")).traces) == 3


def test_settings_may_come_from_a_file(model, prompts, tmp_path):
    settings = tmp_path / "capture.toml"
    settings.write_text(
        'engine = "transformers"\ntop-k = 3\nmax-new-tokens = 5\n'
        '[template-arg]\ntoday = "2026-01-02"\n'
    )
    invoke(
        *("generate", "--config", settings, "--model", model, "--prompts", prompts),
        *("--out", tmp_path / "cache", "--top-k", 4),
    )
    header = open_cache(str(tmp_path / "cache")).header
    assert (header.top_k, header.sampling["max_tokens"]) == (4, 5)
    config = json.loads((tmp_path / "cache" / "cache.json").read_text())["config"]
    assert config["template_arg"] == {"today": "2026-01-02"}


def bad_calls(model, prompts, tmp_path):
    out = tmp_path / "cache"
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"prompt": "a"}\n{"prompt": \n')
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": ""}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a " * CONTEXT}])
    return {
        "no such model": (arguments(tmp_path / "nowhere", prompts, out), "no such folder"),
        "not a model": (arguments(tmp_path, prompts, out), "holds no config.json"),
        "no such file": (
            arguments(model, tmp_path / "no.jsonl", out),
            "no.jsonl: no such file or folder",
        ),
        "bad line": (arguments(model, bad_line, out, "--strict"), "bad.jsonl:2: not JSON"),
        "empty prompt": (arguments(model, empty, out), "empty.jsonl:1: the prompt is empty"),
        "long prompt": (arguments(model, long, out), f"prompt of {CONTEXT} tokens"),
        "no cache": (["inspect", str(tmp_path)], "no cache here"),
        "nothing to seal": (["seal", str(tmp_path)], "no cache here"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no such model", "not a model", "no such file", "bad line", "empty prompt", "long prompt",
        "no cache", "nothing to seal",
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_1(model, prompts, tmp_path, case, capsys, monkeypatch):
    call, message = bad_calls(model, prompts, tmp_path)[case]
    monkeypatch.setattr(sys, "argv", ["cache-teacher", *call])
    assert run_command(CommandLine(*COMMAND_LINE)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("cache-teacher: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not (tmp_path / "cache").exists()


GENERATE = ["generate", "--model", "m", "--prompts", "p", "--out", "o"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["generate"], "Missing option '--model'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["generate", "--mass"], "requires an argument"),
        (["seal"], "Missing argument 'CACHE'"),
        ([*GENERATE, "--top-k", "999"], "--top-k: expected a number from 1 to 254, got 999"),
        ([*GENERATE, "--num-replicas", "2", "--worker", "0/2"], "leave it out with --num-replicas"),
        ([*GENERATE, "--think-open", ""], "--think-open: expected a value, got an empty text"),
        (["truncate", "c", "o", "--lead-span", "2"], "above 0 and at most 1, got 2"),
        (["export", "c", "o", "--parquet", "--text"], "leave them out with Parquet"),
        (["plan", "--num-prompts", "3"], "expected a sample (--sample) or --tokens-per-trace"),
        (
            ["plan", "--num-prompts", "3", "--sample", "c", "--gpu-tflops", "400"],
            "needs --teacher-params",
        ),
        (
            ["audit", "c", "--model", "m", "--num-traces", "0"],
            "expected a number at least 1, got 0",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2(monkeypatch, capsys, call, message):
    monkeypatch.setattr(sys, "argv", ["cache-teacher", *call])
    assert run_command(CommandLine(*COMMAND_LINE)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def wait_for_traces(out, num_bytes):
    """Until the journal holds some traces."""
    for _ in range(600):
        journals = list(Path(out).glob("journal/*.journal"))
        if journals and journals[0].stat().st_size > num_bytes:
            return
        time.sleep(0.1)
    raise AssertionError("the capture wrote nothing within a minute")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A capture that nobody stopped: its prompts and its traces."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"id": f"p{n}", "prompt": f"a {n % 30} b"} for n in range(60)]
    prompts = write_rows(folder / "prompts.jsonl", rows)
    call = arguments(model, prompts, folder / "cache", "--max-new-tokens", "60")
    run_forked(CACHE_TEACHER, *call, expect=0)
    return prompts, read_all(open_cache(str(folder / "cache")))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_capture_goes_on_and_ends_like_one_that_was_not(model, whole, tmp_path, signum):
    prompts, expected = whole
    call = arguments(model, prompts, tmp_path / "cache", "--max-new-tokens", "60")
    process = Forked(CACHE_TEACHER, *call)
    wait_for_traces(tmp_path / "cache", 2000)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signum
        assert "run the same command again to resume" in said
    done = run_forked(CACHE_TEACHER, *call, expect=0)
    assert " 0 were already there" not in done.stdout
    stopped = read_all(open_cache(str(tmp_path / "cache")))
    assert sorted(stopped) == sorted(expected)
    for name, trace in expected.items():
        for column in ("token_ids", "k", "top_ids", "top_logits", "tail_logit"):
            np.testing.assert_array_equal(getattr(trace, column), getattr(stopped[name], column))
