"""Captures and training runs killed again and again end as if nothing had happened."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import soak_kills
import train_kills

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("num_workers", "num_kills"), [(1, 30), (3, 12)])
def test_killed_captures_end_with_every_trace_once(tmp_path, num_workers, num_kills):
    outcome = soak_kills.kill_captures(tmp_path, num_kills, num_workers=num_workers, seed=1)
    assert outcome.findings == []
    assert outcome.kills.total() == num_kills
    assert outcome.kills.total() > outcome.kills["at random"] > 0  # some were aimed and hit
    assert outcome.stops > 0  # SIGTERM and Ctrl-C, answered with 143 and 130
    assert outcome.restarts >= num_kills
    assert (outcome.lost, outcome.duplicated, outcome.changed) == (0, 0, 0)


def test_killed_trainings_end_with_the_same_student(tmp_path):
    outcome = train_kills.kill_trainings(tmp_path, 4, seed=1)
    assert outcome.findings == []
    assert outcome.num_kills == 4
    assert outcome.num_runs >= 1
