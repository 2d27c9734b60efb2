"""The report for a GPU machine: what is kept of steps that end badly, and that all of it works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu_report  # noqa: E402 (it lies beside the scripts that it runs)
import gpu_report_parts  # noqa: E402
import gpu_report_training  # noqa: E402

Figure = gpu_report_parts.Figure


def make_step(tmp_path, code, *, limit_s=60, **settings):
    """A step that runs this code, `out` being where its results go."""
    script = tmp_path / "step.py"
    script.write_text(f"import sys, json\nout = sys.argv[-1]\n{code}\n")
    return gpu_report_parts.Step(
        "loss", "a step", str(script), (), limit_s, lambda result: [Figure("x", str(result["x"]))],
        **settings,
    )  # fmt: skip


WRITES = "open(out, 'w').write(json.dumps({'x': 7}))"


def test_a_step_that_ends_well_gives_its_figures(tmp_path):
    outcome = gpu_report.run_step(make_step(tmp_path, WRITES), tmp_path, 100)
    assert (outcome.status, outcome.figures) == ("done", [Figure("x", "7")])
    assert outcome.result == {"x": 7}


def test_a_crash_is_reported_by_its_last_line_and_keeps_what_was_written(tmp_path):
    crash = f"{WRITES}\nprint('no memory', file=sys.stderr)\nimport os; os.abort()"
    outcome = gpu_report.run_step(make_step(tmp_path, crash), tmp_path, 100)
    assert outcome.status == "failed"
    assert "no memory" in outcome.reason
    assert outcome.figures == [Figure("x", "7")]


def test_a_step_that_hangs_is_ended_with_its_children_and_keeps_what_was_written(tmp_path):
    hang = (
        f"{WRITES}\nimport subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(out + '.pid', 'w').write(str(child.pid))\ntime.sleep(600)"
    )
    outcome = gpu_report.run_step(make_step(tmp_path, hang, limit_s=1), tmp_path, 100)
    assert (outcome.status, outcome.figures) == ("out of time", [Figure("x", "7")])
    (pid_file,) = tmp_path.glob("*.pid")
    child = int(pid_file.read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the step lives on")


def test_a_result_of_an_earlier_report_is_not_taken_for_one_of_this(tmp_path):
    gpu_report.run_step(make_step(tmp_path, WRITES), tmp_path, 100)
    outcome = gpu_report.run_step(make_step(tmp_path, "raise SystemExit(3)"), tmp_path, 100)
    assert (outcome.status, outcome.figures) == ("failed", [])


def test_a_step_that_ends_well_without_a_result_has_failed(tmp_path):
    outcome = gpu_report.run_step(make_step(tmp_path, "pass"), tmp_path, 100)
    assert outcome.status == "failed"
    assert "result cannot be read" in outcome.reason


def test_a_second_try_has_more_arguments_a_name_that_says_so_and_no_third(tmp_path):
    code = f"assert '--eager' in sys.argv\n{WRITES}"
    step = make_step(tmp_path, code, if_failed=("--eager",))
    assert gpu_report.run_step(step, tmp_path, 100).status == "failed"
    again = gpu_report.second_try(step)
    assert (again.name, again.if_failed) == ("a step --eager", ())
    assert gpu_report.run_step(again, tmp_path, 100).status == "done"


def test_what_is_not_installed_or_has_no_time_left_is_said_and_not_run(tmp_path):
    missing = make_step(tmp_path, WRITES, needs=("json", "no_such_module_here"))
    outcome = gpu_report.run_step(missing, tmp_path, 100)
    assert (outcome.status, outcome.reason) == ("not run", "no_such_module_here not installed")
    outcome = gpu_report.run_step(make_step(tmp_path, WRITES), tmp_path, 2)
    assert (outcome.status, outcome.reason) == ("not run", "no time left")


def test_both_files_hold_every_figure_its_goal_and_what_went_wrong(tmp_path):
    outcomes = [
        gpu_report.Outcome(
            "loss",
            "a",
            "done",
            figures=[Figure("ms", "30", "<= 27", False, "22 to 27", "the kernel is slow")],
        ),
        gpu_report.Outcome("train", "b", "out of time", "after 45 s"),
    ]
    gpu_report.write(tmp_path, {"device": "H200", "torch": "2.11"}, outcomes)
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["about"] == {"device": "H200", "torch": "2.11"}
    assert report["steps"][0]["figures"][0]["is_met"] is False
    table = (tmp_path / "gpu_report.md").read_text().splitlines()
    assert table[0] == "device H200, torch 2.11"
    assert table[4:] == [
        "| loss | ms | 30 | 22 to 27 | <= 27: MISSED |",
        "| train | b | out of time: after 45 s |  |  |",
        "",
        "ms, missed: the kernel is slow.",
    ]


def test_every_option_that_a_gpu_machine_will_be_given_exists():
    scripts = {}
    every_step = [
        *gpu_report_parts.steps(smoke=False), *gpu_report_training.training_steps(smoke=False)
    ]  # fmt: skip
    for step in every_step:
        options = {argument for argument in step.arguments if argument.startswith("--")}
        options.update(step.if_failed)
        scripts.setdefault(step.script, set()).update(options | {"--json"})
    for script, options in scripts.items():
        known = (ROOT / script).read_text()
        assert {option for option in options if f'"{option}"' not in known} == set()
    assert {step.part for step in every_step} == set(gpu_report.ALL_PARTS)


def loss_result(hidden=2048, **row):
    table = {"tokens": 8192, "hidden": hidden, "vocab": 151_936, "dtype": "bfloat16"}
    row = {"ms": 26.0, "peak_extra_bytes": 2**31, "grad_rel_error": 1e-3, **row}
    rows = {"sparse_kl": row, "naive": {**row, "ms": 52.0}, "chunked_ce": {**row, "ms": 26.0}}
    return {"tables": {f"hidden {hidden}": table | {"rows": rows}}}


def test_goals_belong_to_a_card_and_to_the_sizes_they_were_set_for():
    def verdicts(card, hidden=2048):
        figures = gpu_report_parts._loss(loss_result(hidden), card)
        return [figure.is_met for figure in figures]

    assert verdicts("H200") == [False, True, True, True, True]
    assert verdicts("H100") == [True, True, True, True, True]
    assert verdicts(None) == [None, True, True, True, True]
    assert verdicts("H200", 1024) == [None, True, True, None, True]
    assert gpu_report_parts.card_of("NVIDIA H100 80GB HBM3, 81559 MiB") == "H100"
    assert gpu_report_parts.card_of("NVIDIA A100-SXM4-80GB, 81920 MiB") is None


def test_a_prediction_stands_beside_every_size():
    for hidden, low, high in ((1024, 12, 18), (2048, 22, 28), (4096, 42, 56)):
        figure = gpu_report_parts._loss(loss_result(hidden), "H200")[0]
        best, worst = map(float, figure.predicted.removesuffix(" ms").split(" to "))
        assert low < best < worst < high


def test_a_bench_that_was_stopped_gives_the_figures_that_it_had():
    only_times = loss_result(peak_extra_bytes=None, grad_rel_error=None)
    assert len(gpu_report_parts._loss(only_times, "H200")) == 3
    row = {"lead_span": 1.0, "step_s": 1.0, "tokens_per_s": 8.0, "time_ratio": 1.0}
    half = {**row, "lead_span": 0.5, "time_ratio": 0.5}
    result = {"shape": "1.7b", "tokens": 8192, "rows": {"1": row, "0.5": half}}
    assert [figure.is_met for figure in gpu_report_parts._train(result)] == [None, None, True]


def test_figures_of_a_running_step_are_in_the_report_before_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "_LOOK_S", 0.2)
    step = make_step(tmp_path, f"{WRITES}\nimport time\ntime.sleep(600)", limit_s=1)
    seen = []
    gpu_report.run_step(step, tmp_path, 100, seen.append)
    assert seen
    assert {(each.status, *each.figures) for each in seen} == {("running", Figure("x", "7"))}


@pytest.mark.parametrize("call", gpu_report.CALLS)
def test_a_call_fits_into_nine_minutes_at_the_limits_of_its_steps(call):
    parts = gpu_report.CALLS[call]
    every_step = [
        *gpu_report_parts.steps(smoke=False), *gpu_report_training.training_steps(smoke=False)
    ]  # fmt: skip
    found = [step for step in every_step if step.part in parts]
    assert {step.part for step in found} == set(parts)
    assert 0 < sum(step.limit_s for step in found) <= 540


def test_training_figures_stand_beside_their_predictions_and_misses_are_shown():
    result = {
        "shape": "0.6b", "tokens": 8192, "num_parameters": 600_000_000, "num_waits": 1,
        "waits": "file.py:7", "copy_ms": {"pinned": 0.2, "pageable": 9.0},
        "optimizer_ms": {"fused": 6.0, "foreach": 30.0}, "pass_ms": 100.0,
        "compiled_pass_ms": 80.0, "short_ms": {"alone": 50.0, "packed": 40.0},
        "memory": {"predicted_bytes": 28 * 2**30, "peak_bytes": 27 * 2**30},
    }  # fmt: skip
    found = {
        figure.what.removeprefix("0.6b, 8,192 tokens: "): figure
        for figure in gpu_report_training.step_figures(result)
    }
    judged = {what: figure.is_met for what, figure in found.items() if figure.is_met is not None}
    assert judged == {
        "waits for the GPU in a micro-batch": False,
        "CPU's time to copy, pinned": True,
        "AdamW, fused": True,  # 600 M weights of 28 bytes at 3 TB/s are 5.6 ms
        "AdamW, foreach": False,
        "time with --compile": True,
        "short traces, time when they share rows": True,
        "memory": True,
    }
    assert found["waits for the GPU in a micro-batch"].value == "1 file.py:7"
    assert found["AdamW, fused"].goal == "predicted 5.6 ms"


def test_a_gpu_that_runs_without_its_kernels_is_pointed_out():
    for device, kernels, is_met in (
        ("cuda", "TritonPasses", True),
        ("cuda", "TorchPasses", False),
        ("cpu", "TorchPasses", None),
    ):
        result = {"device": device, "kernels": kernels, "checks": {}}
        assert gpu_report_parts._checks(result)[0].is_met is is_met


@pytest.mark.slow
@pytest.mark.vllm
def test_the_whole_report_runs_on_a_cpu_in_small(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/gpu_report.py", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert {(s["part"], s["status"], s["reason"]) for s in report["steps"]} == {
        (part, "done", "") for part in gpu_report.ALL_PARTS
    }
    assert all(step["figures"] for step in report["steps"])
    assert done.returncode == 0, done.stdout + done.stderr
    for step in report["steps"]:
        for figure in step["figures"]:
            assert figure["is_met"] in (None, True), figure
            assert figure["what"] in done.stdout.replace("\n", " ")


@pytest.mark.slow
def test_without_cuda_the_report_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "tools/gpu_report.py", "--only", "checks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 2
    assert "--smoke runs small sizes on the CPU" in done.stderr
