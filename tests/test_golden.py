"""Caches that were written once are read for ever, with the same values."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caches import ARRAYS, read_all

from teacher_cache.format import open_cache

GOLDEN = sorted((Path(__file__).parent / "data").glob("golden-*"))


def test_every_format_version_has_a_golden_cache():
    assert [folder.name for folder in GOLDEN] == ["golden-v1"]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("lead_span", [0.1, 0.5, 1.0])
def test_a_golden_cache_is_read_as_on_its_first_day(folder, lead_span):
    expected = json.loads((folder / "expected.json").read_text())
    cache = open_cache(str(folder))
    assert cache.fingerprint == expected["fingerprint"]
    found = read_all(cache, lead_span)
    assert sorted(found) == sorted(expected["traces"])
    for trace_id, values in expected["traces"].items():
        trace = found[trace_id]
        for name in ARRAYS:
            part = getattr(trace, name)
            np.testing.assert_array_equal(part, np.array(values.pop(name))[: len(part)])
        for name, value in values.items():
            assert getattr(trace, name) == value


@pytest.mark.slow
def test_reading_needs_no_zstandard():
    """The module is for journals; a machine that only trains need not have it."""
    code = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from teacher_cache.format import open_cache\n"
        f"cache = open_cache({str(GOLDEN[0])!r})\n"
        "rows = {row: t.n_total for row, t in enumerate(cache.shards[0].traces)}\n"
        "print(len(cache.read(0, rows)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2
