"""cache-teacher as a command, and the files that it is given."""

import json
import sys

from click.testing import CliRunner

from teacher_cache.cli.group import cli

COMMAND = [sys.executable, "-c", "from teacher_cache.cli import program; program()"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model, prompts, out, *more, engine="transformers"):
    """The command line of a small capture."""
    return [
        *("generate", "--engine", engine, "--model", str(model), "--prompts", str(prompts)),
        *("--out", str(out), "--max-new-tokens", "12", "--top-k", "6", *map(str, more)),
    ]


def invoke(*args):
    """What a command of cache-teacher says, run in this process."""
    result = CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
