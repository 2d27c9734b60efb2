"""TensorBoard and Weights & Biases: metrics in groups, and settings that runs are compared by."""

import hashlib
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from student_train.run.config import TrainConfig
from teacher_cache.terminal.escape import printable

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


def grouped(line: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under the names that trackers show: `loss/kl`, `heldout/kl_cot`, `data/tokens`."""
    return {_shown_name(name): value for name, value in line.items() if name != "step"}


def _shown_name(name: str) -> str:
    if name.startswith(_HELDOUT):
        return f"heldout/{name.removeprefix(_HELDOUT)}"
    if name.startswith("kl_cache_"):
        return f"loss/{name}"
    return f"{_GROUP_OF.get(name, 'data')}/{name}"


def start_trackers(accelerator: Accelerator, config: TrainConfig, done_steps: int) -> None:
    """Start the run's tracker, or continue it; every process calls this.

    Args:
        accelerator: Accelerator of the run.
        config: Configuration of the run.
        done_steps: Steps before this process; later ones of an earlier process are removed.
    """
    run_id = hashlib.sha256(str(config.out.resolve()).encode()).hexdigest()[:16]
    name, group = shown_name(config)
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "leadspan",
        init_kwargs={
            "tensorboard": {"purge_step": done_steps + 1},
            "wandb": {
                "id": run_id, "name": name, "group": group, "notes": summary(config),
                "resume": "allow", "dir": str(config.out), "config": config.to_json(),
            },
        },
    )  # fmt: skip
    if config.tracker == "tensorboard" and accelerator.is_main_process:
        _describe_run(accelerator.get_tracker("tensorboard", unwrap=True), config)


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


def _describe_run(writer: Any, config: TrainConfig) -> None:  # noqa: ANN401  # a SummaryWriter
    """Settings as hyperparameters of this very run, and as a text.

    `SummaryWriter.add_hparams` would write them into a run of their own, beside the curves.
    """
    from torch.utils.tensorboard.summary import hparams

    settings = config.to_json()
    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
        if value is not None
    }
    summaries = hparams(values, dict.fromkeys(_COMPARED_BY, 0.0))  # type: ignore[no-untyped-call]  # torch's
    for record in summaries:
        writer.file_writer.add_summary(record)
    rows = (f"| {name} | {_in_table(value)} |" for name, value in settings.items())
    heading = f"**{_in_table(shown_name(config)[0])}**: {_in_table(summary(config))}"
    table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
    writer.add_text("settings", f"{heading}\n\n{table}")


def _in_table(value: object) -> str:
    return printable(value).replace("|", "\\|").replace("<", "&lt;")
