import numpy as np
import pytest
from sweeps import costs, curve, make_sweep

from student_train.sweep.conclusion import conclusion
from student_train.sweep.results import csv_rows, group_cells, read_cells
from teacher_cache.format.checksums import (
    DamagedFileError,
    publish_record,
    read_record,
    sha256_of,
)


def groups_of(folder, cells, **settings):
    return {
        g.name: g for g in group_cells(read_cells(make_sweep(folder, cells, **settings), costs))
    }


def test_retention_is_told_both_ways(tmp_path):
    groups = groups_of(tmp_path, curve({0.5: 0.6, 1.0: 0.8}, base=0.2))
    half = groups["span-0.5"]

    assert half.accuracy.value == pytest.approx(0.6)
    assert half.retention.value == pytest.approx(0.75)
    assert half.gain_retention.value == pytest.approx(2 / 3)
    for estimate in (half.accuracy, half.retention, half.gain_retention):
        assert estimate.low < estimate.value < estimate.high
    assert groups["span-1"].gain_retention.value == 1.0


def test_there_is_no_ratio_where_the_full_length_gain_may_be_none(tmp_path):
    groups = groups_of(tmp_path, curve({0.5: 0.21, 1.0: 0.22}, base=0.2))

    assert groups["span-0.5"].gain_retention is None
    assert groups["span-0.5"].retention.value == pytest.approx(0.21 / 0.22)


@pytest.mark.parametrize("left_out", ["base", "span-1"])
def test_without_the_cells_it_is_measured_against_there_is_no_retention(tmp_path, left_out):
    cells = [cell for cell in curve({0.5: 0.6, 1.0: 0.8}) if cell[0] != left_out]
    half = groups_of(tmp_path, cells)["span-0.5"]

    assert half.gain_retention is None
    assert (half.retention is None) == (left_out == "span-1")


def test_the_interval_covers_prompts_and_seeds():
    """Draws of whole sweeps from known accuracies: the interval holds the truth about as often."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        difficulty = rng.normal(0, 0.6, 150)
        cells = []
        for _ in range(4):
            logit = 0.5 + rng.normal(0, 0.15) - difficulty
            right = rng.random(150) < 1 / (1 + np.exp(-logit))
            cells.append(FakeCell({"group": "g", "options": {}, "kind": "span"}, right * 1.0))
        (group,) = group_cells(cells)
        truth = np.mean(1 / (1 + np.exp(-(0.5 - np.random.default_rng(1).normal(0, 0.6, 99999)))))
        covered += group.accuracy.low <= truth <= group.accuracy.high
    assert 0.9 <= covered / 60 <= 1.0


class FakeCell:
    def __init__(self, result, right_P):
        self.result, self.right_P, self.group = result, right_P, result["group"]


def test_one_seed_gives_the_interval_of_prompts_alone(tmp_path):
    one = groups_of(tmp_path / "1", curve({1.0: 0.5}, seeds=1))["span-1"].accuracy
    few = groups_of(tmp_path / "2", curve({1.0: 0.5}, seeds=1), num_prompts=50)["span-1"].accuracy

    assert one.high - one.low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)
    assert few.high - few.low == pytest.approx(2 * (one.high - one.low), rel=0.15)


def test_cells_of_different_students_or_prompts_are_not_put_together(tmp_path):
    make_sweep(tmp_path, curve({1.0: 0.5}, seeds=2))
    file = tmp_path / "cells" / "span-1_seed-1" / "result.json"
    result = read_record(file, "")
    publish_record(file, {**result, "student_fingerprint": "t" * 32})
    with pytest.raises(ValueError, match="started from 2 different students"):
        read_cells(tmp_path, costs)
    completions = file.with_name("completions.jsonl")
    completions.write_text('{"prompt": 0, "right": true}\n')
    publish_record(file, {**result, "completions_sha256": sha256_of(completions)})
    with pytest.raises(ValueError, match="different numbers of prompts"):
        read_cells(tmp_path, costs)


@pytest.mark.parametrize("name", ["result.json", "completions.jsonl"])
@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_in_a_cells_figures_is_named(tmp_path, name, seed):
    make_sweep(tmp_path, curve({1.0: 0.5}, seeds=2))
    file = tmp_path / "cells" / "span-1_seed-1" / name
    data, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=rf"{name}: damaged.*run the same sweep again"):
        read_cells(tmp_path, costs)


def test_a_row_per_run_has_what_was_measured(tmp_path):
    rows = csv_rows(read_cells(make_sweep(tmp_path, curve({0.5: 0.6, 1.0: 0.8})), costs))
    by_cell = {row["cell"]: row for row in rows}
    half = by_cell["span-0.5_seed-2"]

    assert len(rows) == 7
    for name, value in {
        "lead_span": 0.5, "sections": "all", "seed": 2, "accuracy": pytest.approx(0.61),
        "heldout_kl": 0.125, "heldout_kl_cot": 0.25, "tokens": 500, "bytes_read": 4000,
        "flops": 5e8, "peak_memory_bytes": 700000, "wall_s": 2.0, "cot_share": 0.5,
        "unfinished_share": 0.25, "accuracy_3": pytest.approx(0.61),
        "break_even_runs": 500 / (250 * 2),
    }.items():  # fmt: skip
        assert half[name] == value
    assert by_cell["base"]["lead_span"] == by_cell["base"]["tokens"] == ""


def said(folder, cells):
    return conclusion(group_cells(read_cells(make_sweep(folder, cells), costs)))


def test_the_answer_names_the_shortest_span_that_keeps_enough(tmp_path):
    cells = curve({0.25: 0.3, 0.5: 0.77, 0.75: 0.79, 1.0: 0.8})
    cells += [("half-steps", "half-steps", 0, {"max_steps": 5}, 0.5)]
    sentence = said(tmp_path, cells)

    assert sentence.startswith(
        "The shortest lead span that keeps 90% of the accuracy gain over the untrained student is "
        "0.5, which keeps 95% ("
    )
    assert "for 50% of the FLOPs, 58% of the peak memory" in sentence
    assert "Half the computation on whole traces keeps, with half the steps 50% (" in sentence


def test_the_answer_says_when_no_span_keeps_enough(tmp_path):
    sentence = said(tmp_path, curve({0.5: 0.4, 0.75: 0.5, 1.0: 0.8}))

    assert sentence.startswith("No lead span below 1 keeps 90% of the accuracy gain over")
    assert "the nearest is 0.75, which keeps 50% (" in sentence
    assert "lead span 0.5, which keeps 33% (" in sentence


def test_the_answer_falls_back_on_raw_accuracy_or_says_why_there_is_none(tmp_path):
    no_gain = said(tmp_path / "1", curve({0.5: 0.2, 1.0: 0.21}, base=0.2))
    assert "of the full-length accuracy (there is no gain over the untrained student" in no_gain
    assert "no full-length cell" in said(tmp_path / "2", curve({0.5: 0.2}))
    assert "no lead span below 1" in said(tmp_path / "3", curve({1.0: 0.2}))
    assert "nothing right" in said(tmp_path / "4", curve({0.5: 0.0, 1.0: 0.0}, seeds=1, base=0.0))
