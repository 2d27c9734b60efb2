"""What the README shows exists: commands, options, files."""

import re
import shlex
from pathlib import Path

import pytest

import student_train.cli
import teacher_cache.cli

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


def test_no_placeholder_is_left_in_the_readme():
    assert re.findall(r"\b[A-Z]{4,}_[A-Z]{4,}\b|\bNUMBERS\b", README) == []
