"""Every option of every command is documented once, and no other is."""

import re
import sys
from collections import Counter
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from option_reference import PROGRAMS, reference  # noqa: E402 (it lies beside the other tools)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_reference_is_what_the_configurations_say_today(program):
    group, file = PROGRAMS[program]
    assert file.read_text() == reference(program, group), "run python tools/option_reference.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_every_command_is_documented_once_and_no_other(program):
    group, file = PROGRAMS[program]
    documented, command = Counter(), None
    for line in file.read_text().splitlines():
        if line.startswith("## "):
            command = line[3:]
        if found := re.match(r"\| ((?:`[^`]+` ?)+) \|", line):
            documented.update((command, name) for name in re.findall("`([^`]+)`", found[1]))
    existing = Counter(
        (name, flag)
        for name, command in group.commands.items()
        for param in command.params
        for flag in (
            [param.name.upper()]
            if isinstance(param, click.Argument)
            else [*param.opts, *param.secondary_opts]
        )
    )
    assert documented == existing
    assert set(existing.values()) == {1}


def test_the_reference_says_bounds_choices_defaults_and_what_may_change():
    text = PROGRAMS["train-student"][1].read_text()
    (batch_tokens,) = re.findall(r"^\| `--batch-tokens` .*$", text, re.MULTILINE)
    assert "whole number, at least 1 | `16384`" in batch_tokens
    assert batch_tokens.endswith("*Resume.* |")
    (optimizer,) = re.findall(r"^\| `--optimizer` .*$", text, re.MULTILINE)
    assert "`adamw`, `adafactor`, `adamw8bit` | `adamw`" in optimizer
    assert "Resume" not in optimizer
