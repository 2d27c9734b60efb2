"""Objectives from the command line: reachable, refused, told, and apart for every mixed cache."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import make_cache, make_trace, make_traces
from students import make_model, make_student

from student_train.batch.micro_batch import micro_batches
from student_train.cli.group import cli
from student_train.data.tokens import SelectedTrace, TokenSelection
from student_train.model.forward import StudentWithLoss, sum_names
from student_train.model.heldout import heldout_figures
from student_train.model.load import head_of
from student_train.objective import DIVERGENCES, TAILS, Objective
from student_train.run.config import TrainConfig
from student_train.sweep.cell_run import run_command
from student_train.sweep.cells import Cell
from student_train.sweep.config import SweepConfig


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    caches = [make_cache(folder / f"cache-{seed}", make_traces(12, seed=seed)) for seed in range(2)]
    return caches, make_student(folder / "student")


def run(inputs, out, *more, num_caches=1):
    caches, student = inputs
    words = ["run", "--student", student, "--out", str(out), "--tracker", "none", *more]
    for cache in caches[:num_caches]:
        words += ["--cache", cache]
    return CliRunner().invoke(cli, [*words, "--max-steps", "2"])


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_objective_that_the_library_has_is_reached_or_refused(inputs, tmp_path):
    caches, student = inputs
    settings = {"cache": (caches[0],), "student": student, "out": tmp_path}
    for divergence in DIVERGENCES:
        for tail in TAILS:
            chosen = {"divergence": divergence, "tail": tail}
            try:
                expected = Objective(**chosen)
            except ValueError as refusal:
                with pytest.raises(ValueError, match=str(refusal)[:20]):
                    TrainConfig(**settings, **chosen)
            else:
                assert TrainConfig(**settings, **chosen).objective == expected


def test_the_objective_is_what_is_trained_and_is_told(inputs, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert run(inputs, plain).exit_code == 0
    result = run(inputs, other, "--divergence", "jsd", "--mix", "0.3", "--ce-weight", "0.25")
    assert result.exit_code == 0, result.output

    assert metrics_of(other)[0]["kl"] < metrics_of(plain)[0]["kl"]  # a JSD is at most log 2
    assert metrics_of(other)[0]["ce"] == metrics_of(plain)[0]["ce"]
    card = (other / "model/README.md").read_text()
    assert "0.75 JSD of 0.3 over the kept entries and one bucket for the tail" in card
    assert "+ 0.25 cross entropy" in card
    config = json.loads((other / "config.json").read_text())["config"]
    assert (config["divergence"], config["mix"]) == ("jsd", 0.3)
    changed = run(inputs, other, "--divergence", "jsd", "--ce-weight", "0.25")
    assert "mix: 0.3 before, None now" in str(changed.exception)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loss-temperature", "2"], "tail's mass at temperature 1 only"),
        (["--divergence", "reverse_kl", "--tail", "renormalise"], "is infinite"),
        (["--divergence", "tvd", "--tail", "zero"], "is no divergence"),
        (["--mix", "0.5"], "forward_kl has none"),
        (["--divergence", "kl"], "forward_kl"),
    ],
)
@pytest.mark.parametrize("command", ["run", "profile"])
def test_what_the_library_refuses_is_an_error_of_usage(inputs, tmp_path, command, words, expected):
    caches, student = inputs
    base = [command, "--cache", caches[0], "--student", student, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*base, *words])
    assert result.exit_code == 2
    assert expected in " ".join(result.output.split())


def test_held_out_figures_are_the_same_whatever_is_minimised():
    model, traces = make_model().eval(), make_traces(3)
    figures = [
        heldout_figures(StudentWithLoss(model, head_of(model), objective), traces, "cpu")
        for objective in (Objective(), Objective("reverse_kl"), Objective(tail="zero"))
    ]
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.slow
def test_mixed_caches_have_their_divergences_apart(inputs, tmp_path):
    assert run(inputs, tmp_path / "mixed", num_caches=2).exit_code == 0
    one = metrics_of(tmp_path / "mixed")[0]

    assert one["kl_cache_1"] != one["kl_cache_2"]
    low, high = sorted([one["kl_cache_1"], one["kl_cache_2"]])
    assert low < one["kl"] < high
    assert "kl_cache_2" in (tmp_path / "mixed/model/README.md").read_text()
    assert run(inputs, tmp_path / "single").exit_code == 0
    assert not any(name.startswith("kl_cache") for name in metrics_of(tmp_path / "single")[0])


@pytest.mark.parametrize("layout", ["alone", "packed", "flat"])
def test_the_sum_of_a_cache_is_that_of_its_traces(layout):
    model = make_model().eval()
    traces = [make_trace(f"t{n}", 20 + 7 * n, seed=n) for n in range(5)]
    selected = [SelectedTrace(trace, TokenSelection(), n % 3) for n, trace in enumerate(traces)]
    batches = micro_batches(selected, batch_tokens=4000, loss_reduction="token", layout=layout)
    found = torch.cat([batch.source for batch in batches])
    counts = np.bincount(found.numpy(), minlength=3)
    assert counts.tolist() == [
        sum(int((t.trace.k > 0).sum()) for t in selected if t.source == n) for n in range(3)
    ]
    if layout != "alone":
        return
    student = StudentWithLoss(model, head_of(model), num_sources=3)
    sums = sum(student(batch)[1] for batch in batches)
    named = dict(zip(sum_names(3, has_own=False), sums.tolist(), strict=True))
    for source in range(3):
        own = [t.trace for t in selected if t.source == source]
        figures = heldout_figures(student, own, "cpu")["all"]
        assert named[f"tokens_cache_{source + 1}"] == figures.num_tokens
        kl = named[f"kl_cache_{source + 1}"] / figures.num_tokens
        assert kl == pytest.approx(figures.kl, rel=1e-4)


def test_all_runs_of_a_sweep_have_its_objective(tmp_path):
    settings = {"cache": "c", "student": "s", "out": tmp_path, "eval_prompts": tmp_path / "p"}
    config = SweepConfig(**settings, divergence="skew_kl", mix=0.2)
    for cell in (
        Cell.of("span", 0, {"lead_span": 0.5}),
        Cell.of("half-steps", 0, {"max_steps": 5}),
    ):
        words = run_command(config, cell)
        assert words[words.index("--divergence") + 1] == "skew_kl"
        assert words[words.index("--mix") + 1] == "0.2"
    assert config.train_config({}).objective.divergence == "skew_kl"
    options = tmp_path / "options.toml"
    options.write_text('divergence = "tvd"\n')
    with pytest.raises(ValueError, match="divergence"):
        SweepConfig(**settings, run_options=options)
