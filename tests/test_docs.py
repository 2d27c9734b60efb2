"""What the README shows exists: commands, options, files."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from fakes import make_traces
from test_format import write

import student_train.cli
import teacher_cache.cli
from student_train.evaluation.config import EvaluateConfig
from student_train.run.config import TrainConfig
from teacher_cache.format import stored_logprobs
from teacher_cache.terminal.config_file import read_config_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GROUPS = {"cache-teacher": teacher_cache.cli.cli, "train-student": student_train.cli.cli}


def shown_commands():
    """Every line of a code block, and every span of code, that is one of our commands."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", text)
    return sorted(
        {line.lstrip("$ ") for line in lines if line.lstrip("$ ").split(" ")[0] in GROUPS}
    )


@pytest.mark.parametrize("line", shown_commands())
def test_a_command_of_the_readme_exists_with_its_options(line):
    program, *words = shlex.split(line, comments=True)
    commands = GROUPS[program].commands
    if not words:
        return
    assert words[0] in commands
    known = {name for option in commands[words[0]].params for name in option.opts}
    used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    assert used <= known | {"--help"}


def test_the_readme_shows_commands_at_all():
    assert len(shown_commands()) > 5


@pytest.mark.parametrize(
    "path",
    sorted(
        set(
            re.findall(
                r"\]\(([^)#:]+)\)|`((?:tools|tests|teacher_cache|student_train)/[\w./-]+)`", README
            )
        )
    ),
)
def test_a_file_that_the_readme_names_is_there(path):
    name = path[0] or path[1]
    assert (ROOT / name).exists(), name


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """Of a cache that lies where the README's snippets look for it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cache", made := make_traces(3))
    return made


def test_the_snippet_of_the_readme_rebuilds_the_logprobs_without_this_package(traces):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert "teacher_cache" not in code
    printed = {}

    def note(trace_id, position, top_ids, logprobs):
        printed[trace_id, position] = (top_ids, logprobs)

    exec(code, {"print": note})
    for trace in traces:
        ends = np.cumsum(trace.k)
        logprobs = stored_logprobs(trace.k, trace.top_logits, trace.tail_logit)
        for t in np.flatnonzero(trace.k):
            entries = slice(ends[t] - trace.k[t], ends[t])
            top_ids, found = printed.pop((trace.trace_id, t))
            assert top_ids == trace.top_ids[entries].tolist()
            np.testing.assert_allclose(found, logprobs[entries], atol=1e-9)
    assert not printed


def test_no_placeholder_is_left_in_the_readme():
    assert re.findall(r"\b[A-Z]{4,}_[A-Z]{4,}\b|\bNUMBERS\b", README) == []


@pytest.mark.parametrize("script", ["tools/demo", "tools/truncation/experiment"])
def test_the_commands_of_a_script_exist_with_their_options(script):
    text = (ROOT / script).read_text().replace("\\\n", " ")
    text = re.sub(r"^ *sweep ", "train-student sweep ", text, flags=re.MULTILINE)  # a function
    calls = re.findall(r"\b(cache-teacher|train-student) (\w+)([^|;\n]*)", text)
    assert len(calls) >= 3
    for program, name, rest in calls:
        known = {flag for param in GROUPS[program].commands[name].params for flag in param.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        ("tools/demo.toml", TrainConfig),
        ("tools/paper.toml", TrainConfig),
        ("tools/truncation/run.toml", TrainConfig),
        ("tools/truncation/evaluate.toml", EvaluateConfig),
    ],
)
def test_a_recipe_holds_options_of_its_command(recipe, config):
    assert read_config_file(ROOT / recipe, config)
