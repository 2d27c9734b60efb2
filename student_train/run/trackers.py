"""The run's tracker: metrics in groups, and settings that runs are compared by.

Accelerate starts it and gives it the metrics: TensorBoard, Weights & Biases, MLflow or Trackio.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from accelerate import Accelerator

from student_train.errors import InterruptedRunError
from student_train.run.config import TrainConfig
from teacher_cache.terminal.escape import printable

logger = logging.getLogger(__name__)

# Names of metrics.jsonl; those that are not here belong to the data.
_GROUPS = {
    "loss": (
        "loss",
        "kl",
        "ce",
        "student_mass",
        "teacher_mass",
        "top1_agreement",
        "router_aux_loss",
    ),
    "optimizer": ("lr", "grad_norm"),
    "speed": ("tokens_per_s", "train_s", "data_wait_share", "flops"),
    "memory": ("peak_memory_bytes",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_HELDOUT = "heldout_"
_COMPARED_BY = ("heldout/kl", "heldout/top1_agreement", "loss/loss", "speed/flops")
_PROJECT = "leadspan"
_MLFLOW_ID, _MLFLOW_GROUP = "leadspan.run", "leadspan.sweep"  # tags: our id of a run, its sweep
_MLFLOW_MOST = 6000  # characters of a parameter's value


def grouped(line: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under the names that trackers show: `loss/kl`, `heldout/kl_cot`, `data/tokens`."""
    return {_shown_name(name): value for name, value in line.items() if name != "step"}


def _shown_name(name: str) -> str:
    if name.startswith(_HELDOUT):
        return f"heldout/{name.removeprefix(_HELDOUT)}"
    if name.startswith("kl_cache_"):
        return f"loss/{name}"
    return f"{_GROUP_OF.get(name, 'data')}/{name}"


def start_tracker(accelerator: Accelerator, config: TrainConfig, run_id: str, step: int) -> None:
    """Start the run's tracker, or continue it; the main process calls this.

    Args:
        accelerator: Accelerator of the run.
        config: Configuration of the run.
        run_id: The run's own id, by which the tracker finds it again.
        step: Steps before this process. TensorBoard drops later ones of an earlier process; the
            others are told of them again.

    Raises:
        ValueError: If the tracker refuses to start, with what it says.
    """
    project = "tensorboard" if config.tracker == "tensorboard" else _PROJECT
    try:
        with redirect_stdout(sys.stderr):  # a program's stdout is for its result
            arguments = _arguments(config, run_id, step)
            accelerator.init_trackers(project, init_kwargs={config.tracker: arguments})
            _describe(accelerator.get_tracker(config.tracker, unwrap=True), config, run_id, step)
    except Exception as error:  # of any kind: a server's, a client's, a database's
        raise ValueError(
            f"--tracker {config.tracker}: it does not start: {type(error).__name__}: {error}"
        ) from error


def log_metrics(
    accelerator: Accelerator, config: TrainConfig, line: Mapping[str, Any], step: int
) -> None:
    """Give the tracker a line of metrics; a tracker that fails is said, and the run goes on."""
    with _run_goes_on(config):
        accelerator.log(grouped(line), step=step)


@contextmanager
def ending_tracker(accelerator: Accelerator, config: TrainConfig) -> Iterator[None]:
    """End the run's tracker, and the group of its processes, after the block.

    A block that fails leaves the group as it is: the other processes may not be there any more.
    """
    try:
        yield
    except BaseException as error:
        is_stopped = isinstance(error, InterruptedRunError)
        _end_run(accelerator, config, "KILLED" if is_stopped else "FAILED")
        if is_stopped:
            _end_training(accelerator)
        raise
    _end_run(accelerator, config, "FINISHED")
    _end_training(accelerator)


def _end_run(accelerator: Accelerator, config: TrainConfig, status: str) -> None:
    """End the run where the package would do so at the process' end: as finished, in any case."""
    if not accelerator.is_main_process:
        return
    with redirect_stdout(sys.stderr):
        if config.tracker == "mlflow":
            import mlflow

            with _run_goes_on(config):
                mlflow.end_run(status)
        elif config.tracker == "trackio":
            import trackio

            with _run_goes_on(config):
                trackio.finish()  # type: ignore[no-untyped-call]  # its own


@contextmanager
def _run_goes_on(config: TrainConfig) -> Iterator[None]:
    """Say what a tracker fails with: its server may be gone, but the run is not."""
    try:
        yield
    except Exception as error:  # of any kind: a server's, a client's, a database's
        logger.warning(
            "--tracker %s: %s: %s; metrics.jsonl has every figure",
            config.tracker, type(error).__name__, error,
        )  # fmt: skip


def _end_training(accelerator: Accelerator) -> None:
    with redirect_stdout(StringIO()):  # Trackio says again that it has finished
        accelerator.end_training()  # trackers write what they hold


def _arguments(config: TrainConfig, run_id: str, step: int) -> dict[str, Any]:
    """Arguments with which the tracker's package begins the run, or finds it again."""
    name, group = shown_name(config)
    match config.tracker:
        case "tensorboard":
            return {"purge_step": step + 1}
        case "wandb":
            return {
                "id": run_id, "name": name, "group": group, "notes": summary(config),
                "resume": "allow", "dir": str(config.out), "config": config.to_json(),
            }  # fmt: skip
        case "trackio":
            # It finds a run by its name alone, and other runs may have the same.
            return {
                "name": f"{name}-{run_id[:8]}", "group": group, "config": config.to_json(),
                "resume": "allow" if step else "never",
            }  # fmt: skip
        case _:
            return {
                "run_id": _id_in_mlflow(run_id), "run_name": name,
                "description": settings_in_markdown(config),
                "tags": {_MLFLOW_ID: run_id} | ({} if group is None else {_MLFLOW_GROUP: group}),
            }  # fmt: skip


def _id_in_mlflow(run_id: str) -> str | None:
    """MLflow's own id of a run that it has been told of before."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)],
        filter_string=f"tags.`{_MLFLOW_ID}` = '{run_id}'",
        output_format="list",
    )
    return found[0].info.run_id if found else None


def _describe(
    run: Any,  # noqa: ANN401  # the tracker's
    config: TrainConfig,
    run_id: str,
    step: int,
) -> None:
    """Show the run's settings, where the tracker has not taken them as it began."""
    match config.tracker:
        case "tensorboard":
            _describe_in_tensorboard(run, config)
        case "trackio" if not step:
            import trackio

            run.log({"settings": trackio.Markdown(settings_in_markdown(config))}, step=0)
        case "mlflow":
            import mlflow

            mlflow.set_tags({_MLFLOW_ID: run_id})  # MLFLOW_TAGS replaces those of the start
            values = {name: str(value)[:_MLFLOW_MOST] for name, value in config.to_json().items()}
            # No parameter may change there; some settings of a resumed run may.
            known = mlflow.get_run(run.info.run_id).data.params
            mlflow.log_params({name: value for name, value in values.items() if name not in known})


def shown_name(config: TrainConfig) -> tuple[str, str | None]:
    """Name of a run among others, and of its sweep, if its folder is SWEEP/cells/NAME/run."""
    cell = config.out.resolve().parent
    if config.out.name == "run" and cell.parent.name == "cells":
        return cell.name, cell.parent.parent.name
    return config.out.resolve().name, None


def summary(config: TrainConfig) -> str:
    """The run in one line: who learns how much of what."""
    settings = config.to_json()
    caches = " and ".join(printable(path) for path in settings["cache"])
    length = f"lead span {settings['lead_span']}"
    if settings["trace_tokens"] is not None:
        length = f"{settings['trace_tokens']} tokens of each trace"
    return f"{printable(config.student)} learns from {caches}: {length}, seed {config.seed}"


def settings_in_markdown(config: TrainConfig) -> str:
    """The run in one line, and its settings as a table."""
    rows = (f"| {name} | {_in_table(value)} |" for name, value in config.to_json().items())
    heading = f"**{_in_table(shown_name(config)[0])}**: {_in_table(summary(config))}"
    return "\n".join([heading, "", "| setting | value |", "| --- | --- |", *rows])


def _describe_in_tensorboard(writer: Any, config: TrainConfig) -> None:  # noqa: ANN401  # a SummaryWriter
    """Settings as hyperparameters of this very run, and as a text.

    `SummaryWriter.add_hparams` would write them into a run of their own, beside the curves.
    """
    from torch.utils.tensorboard.summary import hparams

    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.to_json().items()
        if value is not None
    }
    summaries = hparams(values, dict.fromkeys(_COMPARED_BY, 0.0))  # type: ignore[no-untyped-call]  # torch's
    for record in summaries:
        writer.file_writer.add_summary(record)
    writer.add_text("settings", settings_in_markdown(config))


def _in_table(value: object) -> str:
    return printable(value).replace("|", "\\|").replace("<", "&lt;")
