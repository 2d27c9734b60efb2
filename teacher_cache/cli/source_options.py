"""The options that say where rows come from and how they are laid out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.cli.options import FILE
from teacher_cache.sources import PROMPT_TURNS

_Command = TypeVar("_Command", bound=Callable[..., Any])


def source_options(command: _Command) -> _Command:
    """Of both ways of capturing; their fields are in CaptureConfig."""
    default = GenerateConfig
    options = [
        click.option(
            "--prompt-field",
            help="Column of the prompt, text or messages.  [default: the usual names]",
        ),
        click.option(
            "--id-field", default=default.id_field, show_default=True, help="Column of the id."
        ),
        click.option(
            "--apply-chat-template",
            is_flag=True,
            help="Make prompts that are text the user's turn of a chat.",
        ),
        click.option(
            "--prompt-turns",
            type=click.Choice(PROMPT_TURNS),
            default=default.prompt_turns,
            show_default=True,
            help="Whose tokens of the prompt get distributions, with --capture-prompt.",
        ),
        click.option("--drop-system", is_flag=True, help="Leave out the rows' system prompts."),
        click.option("--dataset-config", help="Configuration of a hub id."),
        click.option(
            "--split",
            default=default.split,
            show_default=True,
            help="Split of a hub id or a saved dataset.",
        ),
        click.option("--ids-file", type=FILE, help="Take only rows with these ids, one a line."),
        click.option(
            "--strict",
            is_flag=True,
            help="Stop at the first row that cannot be used; else it goes into rejects.jsonl.",
        ),
    ]
    return _with(command, options)


def trace_options(command: _Command) -> _Command:
    """Of `score` alone; their fields are in ScoreConfig."""
    options = [
        click.option(
            "--response-field", help="Column of the response.  [default: the usual names]"
        ),
        click.option(
            "--reasoning-field",
            help="Column of the chain of thought, if apart.  [default: the usual names]",
        ),
        click.option(
            "--slice",
            metavar="PART:PROPORTION",
            help="Score a part of each trace as a sequence of its own: lead, middle or last, "
            "e.g. middle:0.5.",
        ),
    ]
    return _with(command, options)


def _with(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command
