"""Benches write one flat JSON object each; the report for a GPU machine reads it back."""

import json
import re
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import bench_json  # noqa: E402 (it lies beside the benches)

RESULT = {
    "ms": 1.5,
    "parts": {"tap": 1, "checks and journal": 2},
    "rows": [{"name": "0.5", "step_s": 0.1}, {"name": "1", "step_s": 0.2}],
    "sizes": [3, 4],
}


def test_figures_are_written_flat_and_read_back_nested(tmp_path):
    file = tmp_path / "bench.json"
    bench_json.write_figures(file, RESULT)
    written = json.loads(file.read_text())
    assert written == {
        "ms": 1.5, "parts/tap": 1, "parts/checks and journal": 2, "rows/0.5/step_s": 0.1,
        "rows/1/step_s": 0.2, "sizes/0": 3, "sizes/1": 4,
    }  # fmt: skip
    assert bench_json.nested(written)["rows"] == {"0.5": {"step_s": 0.1}, "1": {"step_s": 0.2}}


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path):
    bench_json.write_figures(None, RESULT)
    assert list(tmp_path.iterdir()) == []


def test_a_slash_in_a_name_cannot_be_taken_for_a_level():
    assert dict(bench_json.flat({"bfloat16/float32": {"kl": 1}})) == {"bfloat16-float32/kl": 1}


BENCHES = [f for f in sorted(TOOLS.glob("bench_*.py")) if "argparse" in f.read_text()]


@pytest.mark.parametrize("bench", BENCHES, ids=lambda file: file.stem)
def test_every_bench_takes_a_file_for_its_figures(bench):
    source = bench.read_text()
    assert re.search(r'"--json", type=Path, help=', source)
    assert "write_figures(" in source
    assert "arguments.json" in source
