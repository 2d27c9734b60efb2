"""plan: every figure against one that was worked out by hand."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import make_cache, make_traces

from teacher_cache.cli import report_text
from teacher_cache.cli.group import cli
from teacher_cache.examine.plan import PlanConfig, Step, plan
from teacher_cache.format import CacheError, CacheMismatchError, open_cache
from teacher_cache.transform.truncate import truncate_cache


def values(**settings):
    return {step.name: step.value for step in plan(PlanConfig(**settings))}


GIVEN = {"num_prompts": 100_000, "tokens_per_trace": 5000, "bytes_per_token": 40}


def test_size_and_disk_follow_from_given_figures():
    found = values(**GIVEN, samples_per_prompt=2)
    assert found["traces"] == 200_000
    assert found["tokens"] == 1_000_000_000
    assert found["disk"] == 40_000_000_000
    assert found["read at lead span 0.5"] == 20_000_000_000
    assert found["read at lead span 0.25"] == 10_000_000_000


def test_gpu_hours_and_break_even_follow_from_measured_rates():
    # 500 M tokens at 10,000 tokens/s on 4 GPUs: 50,000 s x 4 GPUs = 55.56 GPU hours.
    # A run sees 0.5 x 2 epochs of them, at 20,000 tokens/s on 4 GPUs: 27.78 GPU hours.
    found = values(
        **GIVEN, tokens_per_s=10_000, num_gpus=4, live_tokens_per_s=20_000, lead_span=0.5, epochs=2,
        runs=5,
    )  # fmt: skip
    assert found["capture"] == pytest.approx(500e6 / 10_000 * 4 / 3600)
    assert found["tokens per student run"] == 500e6
    assert found["live teacher per run"] == pytest.approx(500e6 / 20_000 * 4 / 3600)
    assert found["break-even"] == pytest.approx(2)
    assert found["saved in 5 runs"] == pytest.approx(5 * 27.7778 - 55.5556, rel=1e-5)


def test_a_live_teachers_cost_follows_from_its_parameters():
    # 2 x 32e9 x 500e6 = 3.2e19 FLOPs; at 400 TFLOP/s 80,000 s = 22.2 GPU hours.
    found = values(**GIVEN, teacher_params=32e9, student_params=1.5e9, gpu_tflops=400)
    assert found["live teacher's work per run"] == 3.2e19
    assert found["live teacher per run"] == pytest.approx(80_000 / 3600)
    assert found["live teacher's memory"] == 64e9
    assert found["live teacher's share of a step"] == pytest.approx(64 / (64 + 9))


def test_what_no_rate_is_given_for_is_left_out():
    assert not {"capture", "break-even"} & values(**GIVEN, lead_span=0.5, epochs=4).keys()


@pytest.fixture
def sample(tmp_path):
    traces = make_traces(8)
    return make_cache(tmp_path / "sample", traces), traces


def test_a_sample_gives_lengths_bytes_and_what_a_lead_span_reads(sample):
    path, traces = sample
    cache = open_cache(path)
    lengths = [trace.n_total for trace in traces]
    num_bytes = sum(shard.size_bytes for shard in cache.shards)
    found = values(num_prompts=1000, sample=path)
    assert found["tokens per trace"] == pytest.approx(np.mean(lengths))
    assert found["bytes per token"] == pytest.approx(num_bytes / sum(lengths))
    assert found["disk"] == pytest.approx(num_bytes / 8 * 1000)
    for index, shard in enumerate(cache.shards):
        rows = {row: int(t.n_total * 0.25) for row, t in enumerate(shard.traces)}
        cache.read(index, rows)
    assert found["read at lead span 0.25"] == pytest.approx(cache.bytes_read / 8 * 1000)
    (how,) = (s.how for s in plan(PlanConfig(num_prompts=9, sample=path)) if "per trace" in s.name)
    error = 1.96 * np.std(lengths, ddof=1) / np.sqrt(8)
    assert f"mean of 8 traces in {path}, +-{error:.1f}" in how


def test_a_given_figure_replaces_the_samples(sample):
    assert values(num_prompts=10, sample=sample[0], tokens_per_trace=7)["tokens"] == 70


def test_what_is_no_sample_is_refused(sample, tmp_path):
    path, traces = sample
    truncate_cache(open_cache(path), tmp_path / "half", lead_span=0.5)
    with pytest.raises(CacheMismatchError, match="whole traces"):
        plan(PlanConfig(num_prompts=1, sample=str(tmp_path / "half")))
    with pytest.raises(CacheError, match="1 traces are no sample"):
        plan(PlanConfig(num_prompts=1, sample=make_cache(tmp_path / "one", traces[:1])))
    with pytest.raises(ValueError, match="expected a sample \\(--sample\\) or --tokens-per-trace"):
        PlanConfig(num_prompts=1)
    with pytest.raises(ValueError, match="--gpu-tflops"):
        PlanConfig(**GIVEN, gpu_tflops=1)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (123_210_000, "bytes", "123.2 MB"),
        (40e9, "bytes", "40.0 GB"),
        (3.2e19, "FLOPs", "32,000.0 PFLOP"),
        (55.555, "GPU hours", "55.6 GPU hours"),
        (117.0, "", "117"),
        (11_667_000.0, "", "11,667,000"),
        (-3.21, "GPU hours", "-3.21 GPU hours"),
    ],
)
def test_figures_are_said_with_their_units(value, unit, said):
    assert said in report_text.step_line(Step("name", value, unit, "given"))


def test_the_command_prints_its_arithmetic_and_json():
    call = [
        "plan",
        "--num-prompts",
        "100000",
        "--tokens-per-trace",
        "5000",
        "--bytes-per-token",
        "40",
    ]
    said = CliRunner().invoke(cli, [*call, "--teacher-params", "32B"], catch_exceptions=False)
    assert said.exit_code == 0
    assert "20.0 GB  = 500,000,000 tokens x 40.00 bytes" in said.stdout
    assert "64.0 GB  = 2 bytes x 32B parameters" in said.stdout
    told = CliRunner().invoke(cli, [*call, "--json"])
    steps = {step["name"]: step for step in json.loads(told.stdout)["steps"]}
    assert steps["disk"]["value"] == 20e9
    assert steps["disk"]["unit"] == "bytes"


@pytest.mark.parametrize("count", ["none", "-3B", "0", "inf", "1e999"])
def test_a_count_that_is_none_is_wrong_usage(count):
    said = CliRunner().invoke(cli, ["plan", "--num-prompts", "1", "--teacher-params", count])
    assert said.exit_code == 2
    assert "expected a number" in said.output
