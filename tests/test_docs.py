"""What the guides show exists: commands, options, files, links, and the README's commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caches import write
from fakes import make_traces

import student_train.cli.group
import teacher_cache.cli.group
from student_train.evaluation.config import EvaluateConfig
from student_train.run.config import TrainConfig
from teacher_cache.terminal.config_file import read_config_file

ROOT = Path(__file__).parent.parent
GUIDES = sorted(
    [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", ROOT / "tools/README.md"]
    + [path for room in ("teacher_cache", "student_train") for path in (ROOT / room).rglob("*.md")]
)
GROUPS = {
    "cache-teacher": teacher_cache.cli.group.cli,
    "train-student": student_train.cli.group.cli,
}
README = (ROOT / "README.md").read_text()


def name_of(path):
    return str(path.relative_to(ROOT))


def code_blocks(text, language=r"\w*"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shown_commands(text):
    """Every line of a code block, and every span of code, that is one of our commands."""
    blocks = [block.replace("\\\n", " ") for block in code_blocks(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return sorted(
        {line.lstrip("$ ") for line in lines if line.lstrip("$ ").split(" ")[0] in GROUPS}
    )


COMMANDS = [(guide, line) for guide in GUIDES for line in shown_commands(guide.read_text())]


@pytest.mark.parametrize(("guide", "line"), COMMANDS, ids=lambda value: str(value)[-60:])
def test_a_command_that_a_guide_shows_exists_with_its_options(guide, line):
    program, *words = shlex.split(line, comments=True)
    commands = GROUPS[program].commands
    if not words or words[0].startswith("-"):
        return
    assert words[0] in commands
    known = {name for option in commands[words[0]].params for name in option.opts}
    known |= {name for option in commands[words[0]].params for name in option.secondary_opts}
    used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    assert used <= known | {"--help"}


def test_an_option_that_a_guide_names_alone_exists_somewhere():
    known = {"--help", "--check", "--without-vllm", "--json", "--kills"}
    for group in GROUPS.values():
        for command in group.commands.values():
            for option in command.params:
                known.update([*option.opts, *option.secondary_opts])
    used = {}
    for guide in GUIDES:
        if guide == ROOT / "tools/README.md":  # names the options of benches
            continue
        for span in re.findall(r"`(--[a-z][a-z0-9-]*)", guide.read_text()):
            used.setdefault(span, name_of(guide))
    assert {flag: where for flag, where in used.items() if flag not in known} == {}


def test_guides_show_commands_at_all():
    assert len(COMMANDS) > 20


LINKS = [
    (guide, target)
    for guide in GUIDES
    for target in sorted(set(re.findall(r"\]\(([^)\s]+)\)", guide.read_text())))
    if not target.startswith("http")
]


def heading_anchors(text):
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(("guide", "target"), LINKS, ids=str)
def test_a_link_leads_somewhere(guide, target):
    path, _, anchor = target.partition("#")
    file = guide.parent / path if path else guide
    assert file.exists(), target
    if anchor:
        assert anchor in heading_anchors(file.read_text())


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_a_file_that_a_guide_names_is_there(guide):
    pattern = r"`((?:tools|tests|teacher_cache|student_train)/[\w./-]+)`"
    named = set(re.findall(pattern, guide.read_text()))
    words = re.findall(r"tests/test_\w+\.py", guide.read_text())
    assert {path for path in {*named, *words} if not (ROOT / path).exists()} == set()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.vllm
def test_every_command_of_the_readme_runs_on_the_embedded_models(tmp_path):
    rows = (ROOT / "tools/prompts/train.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows[:30]))
    rows = (ROOT / "tools/prompts/eval.jsonl").read_text().splitlines()
    (tmp_path / "held-out.jsonl").write_text("\n".join(rows[:8]))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    blocks = code_blocks(README, "console")
    assert len(blocks) == 2
    done = {}  # command -> folder where it ran
    for number, block in enumerate(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("prompts.jsonl", "held-out.jsonl", "tools"):
            (folder / name).symlink_to(tmp_path / name)
        for line in block.splitlines():
            command = line.removeprefix("$ ").replace("Qwen/Qwen3-32B", "tools/tiny-teacher")
            command = command.replace("Qwen/Qwen3-0.6B", "tools/base-student")
            command = command.replace(" --tensor-parallel-size 2", "")  # one CPU here
            if command in done:  # by now the same as one of the first block, an engine's start
                (folder / "cache").symlink_to(done[command] / "cache")
            else:
                run_shown(command, folder, environment)
                done[command] = folder


def run_shown(command, folder, environment):
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert done.stdout.strip(), command


def test_the_rows_of_the_guides_are_json():
    shown = [
        row.replace("\\|", "|")  # as a table writes it
        for guide in GUIDES
        for row in re.findall(r"`(\{\"[^`]*\})`", guide.read_text())
        if "..." not in row
    ]
    shown += code_blocks(README, "json")
    assert len(shown) >= 5
    for row in shown:
        assert isinstance(json.loads(row), dict)


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """Of a cache that lies where the guides' snippets look for it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cache", made := make_traces(3))
    return made


def test_the_snippet_for_plain_tools_rebuilds_the_logprobs_without_this_package(traces):
    (code,) = code_blocks((ROOT / "teacher_cache/README.md").read_text(), "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    assert "teacher_cache" not in code
    printed = {}

    def note(trace_id, position, top_ids, logprobs):
        printed[trace_id, position] = (top_ids, logprobs)

    exec(code, {"print": note})
    for trace in traces:
        for t in np.flatnonzero(trace.k):
            ids, logprobs = trace.logprobs(t)
            top_ids, found = printed.pop((trace.trace_id, t))
            assert top_ids == ids.tolist()
            np.testing.assert_allclose(found, logprobs, atol=1e-9)
    assert not printed


def test_the_snippet_of_the_readme_shows_a_trace(traces):
    (code,) = code_blocks(README, "python")
    code = code.replace("sum-00000", traces[0].trace_id)
    printed = []
    exec(code, {"print": lambda *values: printed.append(values)})
    cache, logprobs = printed[0]
    assert str(cache).count("\n") == 0
    assert logprobs is not None


@pytest.mark.parametrize(
    "script",
    ["tools/demo", *(f"tools/truncation/{name}" for name in ("experiment", "mixtures"))]
    + [f"tools/truncation/{name}" for name in ("real_text", "from_scratch", "courses")],
)
def test_the_commands_of_a_script_exist_with_their_options(script):
    sourced = ROOT / script.replace(Path(script).name, "common.sh")
    text = sourced.read_text() if sourced.exists() else ""
    text = (text + (ROOT / script).read_text()).replace("\\\n", " ")
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
        ("tools/truncation/run_short.toml", TrainConfig),
        ("tools/truncation/run_tiny.toml", TrainConfig),
        ("tools/truncation/evaluate_tiny.toml", EvaluateConfig),
        ("tools/truncation/evaluate_short.toml", EvaluateConfig),
        ("tools/truncation/real_text.toml", TrainConfig),
        ("tools/truncation/evaluate.toml", EvaluateConfig),
    ],
)
def test_a_recipe_holds_options_of_its_command(recipe, config):
    assert read_config_file(ROOT / recipe, config)
