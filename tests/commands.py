"""cache-teacher as a process, and the files that it is given."""

import json
import subprocess
import sys

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


def run(*args, expect=0):
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    return done
