import numpy as np
import pytest
from sweeps import costs, curve, make_sweep

from student_train.evaluation.intervals import wilson_interval
from student_train.sweep.decisions import Answer, decide
from student_train.sweep.groups import group_cells
from student_train.sweep.results import csv_rows, read_cells
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


def test_one_seed_gives_the_interval_of_prompts_alone(tmp_path):
    one = groups_of(tmp_path / "1", curve({1.0: 0.5}, seeds=1))["span-1"].accuracy

    assert (one.low, one.high) == wilson_interval(0.5, 200)


def test_pairs_tell_more_than_two_intervals(tmp_path):
    """The same prompts are hard for both: the ratio is surer than the accuracies are."""
    half = groups_of(tmp_path, curve({0.5: 0.6, 1.0: 0.8}))["span-0.5"]

    assert half.retention.high - half.retention.low < half.accuracy.high - half.accuracy.low


def test_seeds_that_only_one_side_has_are_left_out(tmp_path):
    cells = [cell for cell in curve({0.5: 0.6, 1.0: 0.8}) if cell[:3] != ("span-0.5", "span", 2)]
    half = groups_of(tmp_path, cells)["span-0.5"]

    assert len(half.cells) == 2
    assert half.retention.value == pytest.approx((0.59 + 0.6) / (0.79 + 0.8))


def test_old_results_without_completions_are_told_by_their_seeds(tmp_path):
    make_sweep(tmp_path, curve({0.5: 0.6, 1.0: 0.8}))
    for file in tmp_path.glob("cells/*/completions.jsonl"):
        file.unlink()
    groups = {g.name: g for g in group_cells(read_cells(tmp_path, costs))}

    assert groups["span-0.5"].gain_retention.value == pytest.approx(2 / 3)
    assert groups["base"].accuracy is None  # one run says nothing of its spread
    assert groups["base"].mean_accuracy == pytest.approx(0.2)
    (decision,) = decide(list(groups.values())).values()
    assert (decision.answer, decision.num_prompts) == (Answer.NO, None)


def test_cells_of_different_students_or_prompts_are_not_put_together(tmp_path):
    make_sweep(tmp_path, curve({1.0: 0.5}, seeds=2))
    file = tmp_path / "cells" / "span-1_seed-1" / "result.json"
    result = read_record(file, "")
    publish_record(file, result | {"student_fingerprint": "t" * 32})
    with pytest.raises(ValueError, match="started from 2 different students"):
        read_cells(tmp_path, costs)
    completions = file.with_name("completions.jsonl")
    completions.write_text('{"prompt": 0, "right": true}\n')
    publish_record(file, result | {"completions_sha256": sha256_of(completions)})
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
