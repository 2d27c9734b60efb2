"""A run on a mixture of lead spans, from the command line to the model card and back."""

import json

import pytest
from click.testing import CliRunner
from fakes import make_cache, make_traces
from students import make_student

from student_train.cli.group import cli
from student_train.sweep.cell_run import run_command
from student_train.sweep.cells import Cell
from student_train.sweep.config import SweepConfig
from teacher_cache.format.lead_spans import LeadSpans


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return {
        "cache": make_cache(folder / "cache", make_traces(40), traces_per_shard=2),
        "student": make_student(folder / "student"),
    }


def run(inputs, out, *more):
    words = ["run", "--cache", inputs["cache"], "--student", inputs["student"], "--out", str(out)]
    return CliRunner().invoke(cli, [*words, "--batch-traces", "8", "--tracker", "none", *more])


@pytest.mark.slow
def test_a_mixture_is_said_in_metrics_card_and_configuration(inputs, tmp_path, caplog):
    caplog.set_level("INFO")
    result = run(inputs, tmp_path / "run", "--lead-span", "1:1,0.375:4")

    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["mean_lead_span"] == pytest.approx(0.5, abs=0.03)
    assert metrics["whole_trace_share"] == pytest.approx(0.2, abs=0.06)
    assert "of the bytes read" in caplog.text
    card = (tmp_path / "run/model/README.md").read_text()
    assert "the first 0.375 of 80 % and 1 of 20 % of the traces" in card
    assert f"{metrics['whole_trace_share']:.1%} of the traces whole" in card
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert config["lead_span"] == "0.375:4,1:1"

    again = run(inputs, tmp_path / "run", "--lead-span", "0.375:4,1:1")
    assert (again.exit_code, "finished already" in again.output) == (0, True)
    other = run(inputs, tmp_path / "run", "--lead-span", "0.375:3,1:1")
    assert isinstance(other.exception, ValueError)
    assert "lead_span" in str(other.exception)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lead-span", "0.5:x"], "lengths with weights such as 0.375:4,1:1"),
        (["--lead-span", "0.5,1.5"], "expected a number above 0 and at most 1, got 1.5"),
        (["--trace-tokens", "2.5"], "a whole number of tokens"),
        (["--trace-tokens", "2.5,7"], "whole numbers"),
        (["--lead-span", "0.5,1", "--trace-tokens", "7"], "not both"),
    ],
)
def test_a_mixture_that_cannot_be_is_an_error_of_usage(inputs, tmp_path, words, expected):
    result = run(inputs, tmp_path / "run", *words)
    assert result.exit_code == 2
    assert expected in " ".join(result.output.split())


def test_a_file_of_options_has_mixtures_and_numbers(inputs, tmp_path):
    (tmp_path / "options.toml").write_text('trace-tokens = "10:1,20:1"\nmax-steps = 1\n')
    result = run(inputs, tmp_path / "run", "--config", str(tmp_path / "options.toml"))
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert config["trace_tokens"] == "10:1,20:1"


def test_a_sweep_tells_its_run_the_mixture(inputs, tmp_path):
    config = SweepConfig(
        cache=inputs["cache"], student=inputs["student"], out=tmp_path, eval_prompts=tmp_path / "p"
    )
    cell = Cell.of("mixture", 0, {"lead_span": LeadSpans.parse("0.375:4,1:1")})
    words = run_command(config, cell)
    assert words[words.index("--lead-span") + 1] == "0.375:4,1:1"
