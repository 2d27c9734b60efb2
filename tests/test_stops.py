"""Real processes stopped at their moments: one line, the right exit code, nobody left behind.

The table of all commands, moments and signals is `python tools/soak.py stops`.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
from forked import TRAINING, WITH_VLLM, Forked

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import soak_stops

# (words of command and moment) -> what is sent to whom. A signal to the command alone is a
# scheduler's, to the group a terminal's.
STOPS = {
    "generate first import": ["INT group"],
    "generate imports": ["TERM command"],
    "generate generating": ["INT group"],
    "generate keeping a trace": ["INT group"],
    "generate compaction": ["TERM command"],
    "generate seal": ["INT group"],
    "generate engine's process": ["INT group", "KILL command", "KILL child"],
    "verify verify": ["INT group"],
    "run heavy imports": ["INT group"],
    "run first step": ["INT group"],
    "run checkpoint": ["TERM command"],
    "evaluate generating": ["INT group"],
    "sweep cells": ["INT group", "KILL command"],
}


# Against a hang: how soon a command ends is measured by the table, on a quiet machine.
LIMIT_S = 15.0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops") / "parts"
    soak_stops.prepare(folder)
    return folder


def test_every_moment_is_at_a_function_that_is_there():
    for moment in soak_stops.moments(Path("parts")):
        module, _, name = moment.held.partition(":")
        owner = importlib.import_module(module) if module else None
        for part in name.split(".") if name else ():
            owner = getattr(owner, part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signal"), [(moment, sent) for moment, all_of in STOPS.items() for sent in all_of]
)
def test_a_command_that_is_stopped_ends_at_once_with_nobody_left(parts, tmp_path, moment, signal):
    (found,) = (
        each for each in soak_stops.moments(parts) if f"{each.command[1]} {each.name}" == moment
    )
    # A moment in the imports needs a process that makes them.
    start = soak_stops.start if "import" in moment else forked
    done = soak_stops.stop(found, *signal.split(), tmp_path / "stop", limit_s=LIMIT_S, start=start)
    assert done.is_right, done


def forked(words, file, folder):
    with Path(os.devnull).open() as nothing:
        streams = (nothing.fileno(), file.fileno(), file.fileno())
        return Forked(
            soak_stops.HOLDING, *words, env=soak_stops.environment(folder), cwd=soak_stops.ROOT,
            streams=streams,
            imported=TRAINING if "--engine" in words or "generate" not in words else WITH_VLLM,
        )  # fmt: skip
