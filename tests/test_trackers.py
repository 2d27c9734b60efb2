"""Trackers other than TensorBoard, with their own packages and stores in files."""

import hashlib
import signal

import pytest
from fakes import make_cache, make_traces
from students import make_student

import student_train.run.loop as loop
from student_train.errors import InterruptedRunError
from student_train.run.config import TrainConfig
from student_train.run.folder import RunFolder, RunIdentity
from student_train.run.loop import train
from student_train.run.metrics_file import MetricsMark


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return make_cache(folder / "cache", make_traces(24)), make_student(folder / "student")


@pytest.fixture
def config(tmp_path, parts):
    """Builds a configuration of four steps in the cell of a sweep, with changes."""
    cache, student = parts

    def build(**changes):
        settings = {
            "student": student, "out": tmp_path / "s/cells/span-0.5_seed-0/run", "lead_span": 0.5,
            "lr": 3e-3, "batch_traces": 4, "heldout_share": 0.3, "max_steps": 3, "save_every": 2,
        }  # fmt: skip
        return TrainConfig(cache=(cache,), **settings | changes)

    return build


def fail_in(monkeypatch, step, act):
    """Do something while a process works on a step."""
    original, calls = loop.global_counts, []

    def global_counts(*args):
        calls.append(None)
        if len(calls) == step:
            act()
        return original(*args)

    monkeypatch.setattr(loop, "global_counts", global_counts)


def run_out_of_paper():
    raise RuntimeError("paper")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package and what it imports
def test_mlflow_shows_one_run_however_often_it_is_stopped(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    def only_run():
        (found,) = mlflow.search_runs(experiment_names=["leadspan"], output_format="list")
        return found

    settings = config(tracker="mlflow")
    with monkeypatch.context() as patch:
        fail_in(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError):
            train(settings)
    assert only_run().info.status == "KILLED"
    with monkeypatch.context() as patch:
        fail_in(patch, 2, run_out_of_paper)  # step 1 is kept
        with pytest.raises(RuntimeError, match="paper"):
            train(settings)
    assert only_run().info.status == "FAILED"
    train(config(tracker="mlflow", keep_last=3))  # which may change; a parameter of MLflow may not

    run = only_run()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "span-0.5_seed-0")
    assert run.data.params["lead_span"] == "0.5"
    assert run.data.params["keep_last"] == "2"
    assert run.data.tags["leadspan.sweep"] == "s"
    assert "| lead_span | 0.5 |" in run.data.tags["mlflow.note.content"]
    shown = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/loss")
    assert [one.step for one in shown] == [1, 2, 3]
    groups = {name.partition("/")[0] for name in run.data.metrics}
    assert groups == {"loss", "optimizer", "speed", "memory", "data", "heldout"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package and what it imports
def test_trackio_shows_one_run_however_often_it_is_stopped(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    settings = config(tracker="trackio")
    with monkeypatch.context() as patch:
        fail_in(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError):
            train(settings)
    train(settings)

    (name,) = SQLiteStorage.get_runs("leadspan")
    assert name.startswith("span-0.5_seed-0-")
    lines = SQLiteStorage.get_logs("leadspan", name)
    assert "| lead_span | 0.5 |" in str(lines[0]["settings"])
    assert [line["step"] for line in lines if "loss/loss" in line] == [1, 2, 3]
    assert "heldout/kl_cot" in lines[-1]
    kept = SQLiteStorage.get_run_config("leadspan", name)
    assert (kept["lead_span"], kept["_Group"]) == (0.5, "s")
    assert capsys.readouterr().out == ""  # which is for the command's result


def test_a_tracker_that_does_not_start_says_why(config, monkeypatch):
    def start(self):
        raise ConnectionError("no answer")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", start)
    with pytest.raises(ValueError, match="tensorboard: it does not start: ConnectionError: no ans"):
        train(config())


def test_a_tracker_that_fails_in_mid_run_does_not_end_it(config, monkeypatch, caplog):
    def log(self, values, step=None, **_):
        raise ConnectionError("gone")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", log)
    settings = config()
    train(settings)
    assert "--tracker tensorboard: ConnectionError: gone" in caplog.text
    assert len((settings.out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_keeps_its_id_and_one_that_begins_anew_gets_another(config):
    identity = RunIdentity(config(), "c", "s", None, [])

    def begun(mark):
        return RunFolder(identity.config.out).begin(identity, mark)

    first = begun(None)
    assert begun(MetricsMark(0, hashlib.sha256().hexdigest())) == first
    assert begun(None) != first
