import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from fakes import make_cache, make_traces
from forked import TRAIN_STUDENT, Forked, run_forked
from same_bits import assert_bitwise_equal
from students import make_student

from student_train.cli import COMMAND_LINE
from student_train.cli.group import cli
from student_train.run.config import TrainConfig
from teacher_cache.format.folder_lock import FolderLock
from teacher_cache.terminal.entry import CommandLine, run_command

ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@pytest.fixture
def parts(tmp_path):
    """A cache and a student."""
    cache = make_cache(tmp_path / "cache", make_traces(40))
    return {"cache": cache, "student": make_student(tmp_path / "student"), "out": tmp_path / "run"}


def command(parts, *options):
    named = [item for name, value in parts.items() for item in (f"--{name}", str(value))]
    return ["run", *named, "--batch-traces", "4", *map(str, options)]


@dataclass
class Done:
    exit_code: int
    stdout: str
    stderr: str


def invoke(*args):
    """The console command, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["train-student", *map(str, args)]),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        exit_code = run_command(CommandLine(*COMMAND_LINE))
    return Done(exit_code, stdout.getvalue(), stderr.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [["--help"], ["run", "--help"], ["evaluate", "--help"], ["sweep", "--help"]]
)
def test_help_is_quick_to_load(args):
    code = (
        "import sys; from student_train.cli.group import cli; cli.main(standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["run", "evaluate", "sweep"])
def test_help_has_a_summary_and_an_example_on_its_own_line(name):
    output = invoke(name, "--help").stdout

    assert re.search(rf"^    train-student {name} --", output, re.MULTILINE)
    assert cli.commands[name].get_short_help_str(200).endswith(".")


@pytest.mark.slow
def test_run_says_where_the_student_is_and_evaluate_what_it_can(parts, tmp_path):
    done = invoke(*command(parts, "--max-steps", "2"))

    assert done.exit_code == 0, done.stderr
    assert re.fullmatch(
        rf"{parts['out']}/model: 2 steps, loss \d+\.\d{{4}}, [\d,]+ bytes read\n", done.stdout
    )
    again = invoke(*command(parts, "--max-steps", "2"))
    assert again.exit_code == 0
    assert again.stdout == done.stdout
    assert f"{parts['out']} is finished already; nothing was done" in again.stderr
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "3 4", "answer": "5"}\n' * 3)
    options = ["--model", parts["out"] / "model", "--prompts", prompts, "--max-new-tokens", 5]
    assert re.match(r"accuracy \d+\.\d% \(95 %: ", invoke("evaluate", *options).stdout)
    figures = json.loads(invoke("evaluate", *options, "--json").stdout)
    assert figures["answers"]["num_prompts"] == 3


@pytest.mark.slow
def test_a_toml_file_gives_defaults_that_options_override(parts, tmp_path):
    file = tmp_path / "paper.toml"
    file.write_text(
        'max-steps = 3\nbatch_traces = 2\nsections = ["cot", "answer"]\nlead-span = 0.9\n'
        f'cache = "{parts["cache"]}"\nstudent = "{parts["student"]}"\n'
    )
    done = invoke("run", "--config", file, "--out", parts["out"], "--max-steps", 1)

    assert done.exit_code == 0, done.stderr
    config = json.loads((parts["out"] / "config.json").read_text())["config"]
    assert config["max_steps"] == 1
    assert config["batch_traces"] == 2
    assert config["sections"] == ["cot", "answer"]
    assert config["lead_span"] == 0.9
    assert config["ce_weight"] == TrainConfig.ce_weight


@pytest.mark.slow
def test_the_papers_recipe_can_be_used(parts):
    recipe = Path(__file__).parent.parent / "tools/paper.toml"
    # A process keeps one precision, and the other tests of this one use float32.
    options = ("--config", recipe, "--lead-span", 0.5, "--max-steps", 2, "--dtype", "float32")
    done = invoke("run", *[f"--{k}={v}" for k, v in parts.items()], *options)

    assert done.exit_code == 0, done.stderr
    config = json.loads((parts["out"] / "config.json").read_text())["config"]
    stated = {
        "lr": 4e-6, "schedule": "onecycle", "weight_decay": 0.05, "clip_norm": 1.0, "epochs": 2,
        "batch_traces": 4, "ce_weight": 0.5, "loss_reduction": "sequence", "lead_span": 0.5,
    }  # fmt: skip
    assert {name: config[name] for name in stated} == stated
    assert metrics_of(parts["out"])[0]["lr"] == pytest.approx(4e-6 / 25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate = 1\n", "no option 'learning-rate'; there are allow_unsealed"),
        ("batch-trace = 1\n", "no option 'batch-trace'; did you mean 'batch_traces'?"),
        ("lr = \n", "expected a TOML file"),
        ("epochs = 1.5\n", "epochs: expected a whole number, got 1.5"),
        ("lead-span = 2\n", "lead-span: expected a number above 0 and at most 1, got 2"),
    ],
)
def test_a_wrong_toml_file_is_named(tmp_path, text, message):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    done = invoke("run", "--config", file)

    assert done.exit_code == 2
    assert str(file) in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "/nowhere"], "--student: /nowhere: no such folder"),
        (["--cache", "/nowhere"], "/nowhere: no cache here"),
        (["--top-k", "500"], "cannot be read with 500"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_one(parts, options, message):
    done = invoke(*command(parts, *options))

    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("train-student: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lead-span", "2"], "--lead-span: expected a number above 0 and at most 1, got 2"),
        (["--sections", "cot,thoughts"], "expected one of prompt, cot, answer, got 'thoughts'"),
        (["--lead-span", "0.5", "--trace-tokens", "4"], "not both"),
        (["--mass", "nan"], "--mass: expected a number above 0 and at most 1, got nan"),
        (["--eval-every", "5"], "--eval-every: expected held-out traces"),
        (["--schedule", "zigzag"], "'zigzag' is not one of"),
        (["--epochs", "few"], "'few' is not a valid integer"),
        (["--cache-weights", "3,a"], "expected numbers with commas between them, got '3,a'"),
    ],
)
def test_a_value_that_the_configuration_refuses_is_exit_code_two(parts, options, message):
    done = invoke(*command(parts, *options))

    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not parts["out"].exists()


def test_a_missing_option_is_exit_code_two():
    assert invoke("run").exit_code == 2


@pytest.mark.slow
def test_a_diverged_run_is_one_line(parts):
    done = invoke(*command(parts, "--lr", "1e30", "--warmup", "0"))

    assert done.exit_code == 1
    assert "the loss is" in done.stderr
    assert "Traceback" not in done.stderr


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LONG_RUN = ("--epochs", 6, "--save-every", 7, "--lr", "1e-3")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The parts of a run, and its folder after a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cache = make_cache(folder / "cache", make_traces(40))
    parts = {"cache": cache, "student": make_student(folder / "student"), "out": folder / "run"}
    run_long(parts)
    return parts


def run_long(parts):
    return run_forked(TRAIN_STUDENT, *command(parts, *LONG_RUN), env=ENVIRONMENT, expect=0)


def wait_for_lines(file, num_lines, process):
    deadline_s = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= num_lines):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_run_goes_on_to_the_same_student(uninterrupted, tmp_path, number, exit_code):
    parts = {**uninterrupted, "out": tmp_path / "run"}
    killed = Forked(TRAIN_STUDENT, *command(parts, *LONG_RUN), env=ENVIRONMENT)
    try:
        wait_for_lines(parts["out"] / "metrics.jsonl", 20, killed)
        killed.send_signal(number)
        _, errors = killed.communicate()
    finally:
        killed.kill()
    assert killed.returncode == exit_code, errors
    if number != signal.SIGKILL:
        assert "Run the same command again to resume." in errors
    assert not (parts["out"] / "model").exists()
    run_long(parts)

    folders = (parts["out"], uninterrupted["out"])
    assert_same_run(*folders)
    assert len(metrics_of(parts["out"])) == 60


def assert_same_run(one, other):
    """Weights, optimizer, schedule, random numbers, order of the traces and every loss."""
    weights = [folder / "model/model.safetensors" for folder in (one, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for name in ("state.pt", "random-00000.pt"):
        files = [max(folder.glob(f"checkpoints/step-*/{name}")) for folder in (one, other)]
        assert_bitwise_equal(*[torch.load(file, weights_only=True) for file in files])
    figures = [
        [
            (values["step"], values["loss"], values["tokens"], values["grad_norm"])
            for values in found
        ]
        for found in (metrics_of(one), metrics_of(other))
    ]
    assert figures[0] == figures[1]


KILLED_IN_A_CHECKPOINT = """
import os, signal, sys, torch

save, num_calls = torch.save, 0

def killed_save(state, file):
    global num_calls
    save(state, file)
    num_calls += 1
    if num_calls == 6:  # the third checkpoint's weights: half of them are on the disk
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_save
from student_train.cli import main
main()
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    uninterrupted, tmp_path
):
    parts = {**uninterrupted, "out": tmp_path / "run"}
    run_forked(
        KILLED_IN_A_CHECKPOINT, *command(parts, *LONG_RUN), env=ENVIRONMENT, expect=-signal.SIGKILL
    )
    assert len(metrics_of(parts["out"])) == 21
    kept = sorted(path.name for path in (parts["out"] / "checkpoints").glob("step-*"))
    assert kept == ["step-000000007", "step-000000014"]
    assert "resuming after step 14 of 60" in run_long(parts).stderr
    assert_same_run(parts["out"], uninterrupted["out"])


LAUNCHED_BY_TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_the_same_student_as_one(parts, tmp_path):
    """accelerate joins processes on a CPU only where it is asked to; we do in any case."""
    options = ("--epochs", 2, "--lr", "1e-3", "--loss-reduction", "sequence", "--batch-tokens", 100)
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "false"}
    done = subprocess.run(
        [*LAUNCHED_BY_TORCHRUN, "student_train.cli", *command(parts, *options)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = {**parts, "out": tmp_path / "one"}
    alone = invoke(*command(one, *options))
    assert alone.exit_code == 0, alone.stderr

    checkpoint = max((parts["out"] / "checkpoints").iterdir())
    assert len(list(checkpoint.glob("random-*.pt"))) == 2  # both took part
    two, one = metrics_of(parts["out"]), metrics_of(one["out"])
    assert len(two) == len(one) == 20
    for left, right in zip(two, one, strict=True):
        for name in ("loss", "kl", "tokens", "grad_norm", "lr"):
            assert left[name] == pytest.approx(right[name], rel=1e-4)
    assert two[-1]["bytes_read"] == one[-1]["bytes_read"]


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_refused(parts, monkeypatch):
    """As where something has set up torch before: this process has found nobody."""
    assert invoke(*command(parts, "--max-steps", 1)).exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = {**parts, "out": parts["out"].with_name("other")}
    done = invoke(*command(other, "--max-steps", 1))

    assert done.exit_code == 1
    assert "2 processes were started (WORLD_SIZE 2, LOCAL_RANK 1), this one finds 1" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not other["out"].exists()


def test_a_folder_in_use_is_refused_before_anything_is_loaded(parts):
    parts["out"].mkdir()
    with FolderLock(parts["out"] / "lock"):
        done = invoke(*command(parts))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert f"{parts['out']}: in use by process {os.getpid()} on " in line


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_refused_and_the_first_is_as_it_would_be(
    uninterrupted, tmp_path
):
    parts = {**uninterrupted, "out": tmp_path / "run"}
    call = (TRAIN_STUDENT, *command(parts, *LONG_RUN))
    first = Forked(*call, env=ENVIRONMENT)
    wait_for_lines(parts["out"] / "metrics.jsonl", 5, first)
    first.send_signal(signal.SIGSTOP)  # as in a long step
    try:
        second = run_forked(*call, env=ENVIRONMENT, expect=1)
    finally:
        first.send_signal(signal.SIGCONT)
    (said,) = [line for line in second.stderr.splitlines() if line.startswith("train-student: ")]
    assert f"{parts['out']}: in use by process {first.pid} on " in said
    assert "Traceback" not in second.stderr
    assert first.wait() == 0
    assert_same_run(parts["out"], uninterrupted["out"])
    assert len(metrics_of(parts["out"])) == 60
    assert not (parts["out"] / "lock").exists()
