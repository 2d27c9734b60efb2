import json
import os
import signal
import time
from dataclasses import replace

import pytest
from fakes import TOKENS, make_cache, make_traces, write_shards
from forked import TRAIN_STUDENT, Forked, run_forked
from students import make_student
from sweeps import add_cell, costs

from student_train.sweep import cell_run, protocol
from student_train.sweep.config import SweepConfig
from student_train.sweep.protocol import run_sweep
from teacher_cache.format import CacheMismatchError
from teacher_cache.format.checksums import DamagedFileError, publish_record
from teacher_cache.format.folder_lock import FolderLock, InUseError

ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@pytest.fixture
def parts(tmp_path):
    """What a sweep is made of; its traces, to ask for what was trained on."""
    traces = make_traces(12)
    prompts = tmp_path / "p.jsonl"
    write_prompts(prompts, ["3 4", "5 6 7"])
    options = tmp_path / "run.toml"
    options.write_text("max-steps = 40\nepochs = 20\nbatch-traces = 4\nsave-every = 2\n")
    evaluation = tmp_path / "evaluate.toml"
    evaluation.write_text("max-new-tokens = 5\n")
    return {
        "cache": make_cache(tmp_path / "cache", traces),
        "student": make_student(tmp_path / "student"),
        "out": tmp_path / "sweep",
        "eval_prompts": prompts,
        "run_options": options,
        "evaluate_options": evaluation,
    }, traces


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))


def test_prompts_that_were_trained_on_are_refused_unless_forced(parts):
    settings, traces = parts
    own = " ".join(TOKENS[token] for token in traces[3].token_ids[: traces[3].cot_start])
    write_prompts(settings["eval_prompts"], ["3 4", own])
    with pytest.raises(ValueError, match=r"1 of 2 prompts are in the training cache.*prompt 2: "):
        run_sweep(SweepConfig(**settings))
    assert not settings["out"].exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lead_spans": (), "baselines": ()}, "nothing to run"),
        ({"worker": "late"}, "worker: expected i/n, got 'late'"),
        ({"eval_prompts": None}, "expected at least one prompt, found none"),
    ],
)
def test_a_sweep_that_has_nothing_to_do_is_refused(parts, changes, message):
    settings, _ = parts
    if changes.get("eval_prompts", "") is None:
        settings["eval_prompts"].write_text("")
        changes = {}
    with pytest.raises(ValueError, match=message):
        run_sweep(SweepConfig(**settings | changes))


def test_sections_with_prompts_need_a_cache_that_has_them(parts, tmp_path):
    settings, traces = parts
    settings["cache"] = make_cache(tmp_path / "without", traces, capture_prompt=False)
    sections = (("prompt", "cot"), ("cot",))
    with pytest.raises(ValueError, match=r"sections prompt\+cot: .* has no distributions of prom"):
        run_sweep(SweepConfig(**settings, sections_list=sections))


def test_a_folder_of_something_else_or_of_another_sweep_is_refused(parts):
    settings, _ = parts
    settings["out"].mkdir()
    (settings["out"] / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder or a sweep's"):
        run_sweep(SweepConfig(**settings))
    publish_record(settings["out"] / "sweep.json", {"cache_fingerprint": "other"})
    with pytest.raises(ValueError, match="holds another sweep"):
        run_sweep(SweepConfig(**settings))


@pytest.fixture
def ran(monkeypatch):
    """Cells that were run, without their processes."""
    names = []

    def run(config, cell, children):
        names.append(cell.name)
        add_cell(
            config.out, cell.group, cell.kind, cell.seed, cell.options, 0.5,
            num_prompts=2, prompts=config.eval_prompts,
        )  # fmt: skip
        return "done"

    monkeypatch.setattr(protocol, "run_cell", run)
    return names


@pytest.mark.slow
def test_workers_share_the_cells_and_the_last_call_reports_all_of_them(parts, ran):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5, 1.0), baselines=("base", "sft"), num_seeds=2)
    results = [run_sweep(replace(config, worker=worker)) for worker in ("1/2", "0/2")]

    assert sorted(ran) == sorted(cell.name for cell in config.cells(40))
    assert [result.num_finished for result in results] == [3, 7]
    assert len((config.out / "results.csv").read_text().splitlines()) == 8
    run_sweep(config)
    assert len(ran) == 7
    calls = json.loads((config.out / "sweep.json").read_text())["calls"]
    assert calls == [config.command()]  # however its cells were shared


@pytest.mark.slow
def test_the_report_is_written_after_every_cell(parts, monkeypatch):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5, 1.0), baselines=(), num_seeds=1)
    page = config.out / "report.html"

    def run(config, cell, children):
        add_cell(
            config.out, cell.group, cell.kind, cell.seed, cell.options, 0.5,
            num_prompts=2, prompts=config.eval_prompts,
        )  # fmt: skip
        return "done"

    monkeypatch.setattr(protocol, "run_cell", run)
    counted, reports = [], []
    write = protocol.write_report
    monkeypatch.setattr(
        protocol, "write_report",
        lambda *a, **k: reports.append(k["num_unfinished"]) or write(*a, **k),
    )  # fmt: skip
    monkeypatch.setattr(
        protocol, "_costs", lambda config, options: counted.append(options) or costs(options)
    )
    run_sweep(config)

    assert reports[0] == 2
    assert reports[-1] == 0
    assert len(reports) == 4  # before and after each of two cells, and at the end
    assert "still to come" not in page.read_text()
    assert len(counted) == 2  # of two cells, each once for all reports


def test_golds_are_checked_before_anything_runs(parts, ran):
    settings, _ = parts
    rows = [{"prompt": "3 4", "answer": "It is what it is and nothing more"}]
    settings["eval_prompts"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="no `answer` here is a number"):
        run_sweep(SweepConfig(**settings))
    assert ran == []


@pytest.mark.slow
def test_another_call_adds_cells_and_one_without_a_full_length_says_so(parts, ran, caplog):
    settings, _ = parts
    caplog.set_level("WARNING")
    short = SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1)
    assert "no full-length cell" in run_sweep(short).answer
    assert "no full-length cell: retention has no base" in caplog.text
    caplog.clear()
    run_sweep(replace(short, lead_spans=(1.0,)))
    run_sweep(replace(short, lead_spans=(0.25,)))

    assert not caplog.text
    assert ran == ["span-0.5_seed-0", "span-1_seed-0", "span-0.25_seed-0"]
    assert len((short.out / "results.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_second_process_of_one_worker_is_refused_and_another_worker_is_not(parts, ran):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5,), baselines=("base",), num_seeds=1)
    with (
        FolderLock(config.out / "w0of2.lock"),
        pytest.raises(InUseError, match=rf"sweep: in use by process {os.getpid()} on "),
    ):
        run_sweep(replace(config, worker="0/2"))
    assert run_sweep(replace(config, worker="1/2")).num_finished == 1
    assert not list(config.out.glob("*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep.json", "flops.json"])
def test_a_damaged_record_of_a_sweep_is_named(parts, ran, name):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1)
    run_sweep(config)
    file = config.out / name
    file.write_bytes(file.read_bytes().replace(b"1", b"3", 1))
    with pytest.raises(DamagedFileError, match=rf"{name}: damaged"):
        run_sweep(config)


@pytest.mark.slow
def test_a_sweep_on_a_capture_that_goes_on_takes_what_is_there(parts, ran, tmp_path):
    settings, traces = parts
    settings["cache"] = write_shards(tmp_path / "growing", traces)
    config = SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1)
    with pytest.raises(CacheMismatchError, match="not complete"):
        run_sweep(config)
    with settings["run_options"].open("a") as file:
        file.write("allow-unsealed = true\n")
    assert run_sweep(config).num_finished == 1


class FinishedRun:
    """In the place of a cell's processes: what they leave behind."""

    stopped_by = None

    def __init__(self, cell, cache_fingerprint):
        self.cell, self.cache_fingerprint = cell, cache_fingerprint

    def run(self, arguments, *, stdout, stderr, lock):
        if "run" in arguments:
            (self.cell / "run").mkdir()
            facts = {"student_fingerprint": "s", "cache_fingerprint": self.cache_fingerprint}
            publish_record(self.cell / "run/config.json", facts)
            publish_record(self.cell / "run/result.json", {"metrics": {"step": 1}})
        else:
            (self.cell / "completions.jsonl").write_text("")
            os.write(stdout, b'{"answers": {"accuracy": 0.5}}')
        return 0


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [("same", "accuracy 50.0%"), ("more", "FAILED, the capture continued, so it was trained on")],
)
def test_a_cell_that_was_trained_on_more_than_the_others_failed(parts, trained_on, said):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1)
    (cell,) = config.cells(40)
    config.out.mkdir()
    publish_record(config.out / "sweep.json", {"cache_fingerprint": "same"})
    folder = config.out / "cells" / cell.name
    assert said in cell_run.run_cell(config, cell, FinishedRun(folder, trained_on))
    has_failed = trained_on == "more"
    assert (folder / "failed.txt").exists() == has_failed
    assert (folder / "result.json").exists() != has_failed


def test_a_cell_that_another_process_works_on_is_left_to_it(parts):
    settings, _ = parts
    config = SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1)
    (cell,) = config.cells(40)
    folder = config.out / "cells" / cell.name
    with FolderLock(folder / "lock"):
        said = cell_run.run_cell(config, cell, None)
        assert f"in use by process {os.getpid()}" in said
        assert [path.name for path in folder.iterdir()] == ["lock"]


def command(settings, *options):
    named = [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["sweep", *named, "--lead-spans", "0.5", "--num-seeds", "1", *options]


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_reports_a_failed_cell_and_repeats_nothing(parts, tmp_path):
    settings, traces = parts
    wrong_teacher = make_student(tmp_path / "teacher", seed=4, initializer_range=1.0)
    call = command(settings, "--baselines", "live", "--live-teacher", wrong_teacher)
    cells = settings["out"] / "cells"
    metrics = cells / "span-0.5_seed-0" / "run" / "metrics.jsonl"
    running = Forked(TRAIN_STUDENT, *call, env=ENVIRONMENT)
    deadline_s = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert "run the same command again" in running.communicate()[1]
    assert running.returncode == 128 + signal.SIGTERM
    assert not list(cells.glob("*/failed.txt"))

    done = run_forked(TRAIN_STUDENT, *call, "--num-parallel", 2, env=ENVIRONMENT, expect=1)
    assert "cell live_seed-0 failed" in done.stderr
    assert "is not the one of the cache" in (cells / "live_seed-0" / "failed.txt").read_text()
    assert "resuming after step" in (cells / "span-0.5_seed-0" / "log.txt").read_text()
    result = json.loads((cells / "span-0.5_seed-0" / "result.json").read_text())
    assert result["run"]["step"] == 40
    assert 0 < result["run"]["tokens_trained"] < 0.55 * 20 * sum(t.n_total for t in traces)
    assert result["run"]["peak_memory_bytes"] > 0
    assert result["evaluation"]["answers"]["num_prompts"] == 2
    assert "--lead-span 0.5 --seed 0" in result["commands"][0]
    assert "Cell live_seed-0 failed" in (settings["out"] / "report.html").read_text()
    assert len((settings["out"] / "results.csv").read_text().splitlines()) == 2

    before = (cells / "span-0.5_seed-0" / "result.json").stat().st_mtime_ns
    again = run_sweep(SweepConfig(**settings, lead_spans=(0.5,), baselines=(), num_seeds=1))
    assert (again.num_finished, again.failed) == (1, ())
    assert (cells / "span-0.5_seed-0" / "result.json").stat().st_mtime_ns == before
