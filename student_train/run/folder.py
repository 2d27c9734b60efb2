"""The folder of a run: its settings, progress and result.

config.json      the resolved configuration, and the identity of caches and student
metrics.jsonl    one object per logged step
result.json      the last step's metrics; exists once the run is finished
checkpoints/     the latest ones, and the best
tensorboard/     the same figures for TensorBoard
model/           the student as a Hugging Face folder; exists once the run is finished
lock             held by the main process while it is at work; see folder_lock
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.run.config import TrainConfig
from student_train.run.metrics_file import MetricsFile, MetricsMark
from teacher_cache.format import ShardList
from teacher_cache.format.checksums import (
    check_folder,
    publish_record,
    read_record,
)
from teacher_cache.format.files import remove_folder, remove_unpublished
from teacher_cache.format.folder_lock import LOCK_NAME
from teacher_cache.terminal.option import changeable_names

_RUN_VERSION = 1
_UNPUBLISHED_CONFIG = ".tmp-config.json-"
SEEN_PREFIX = ".tmp-seen-"  # of files by which processes find out whether they share the folder


@dataclass(frozen=True)
class RunIdentity:
    """Everything that must stay the same for a run to be resumed."""

    config: TrainConfig
    cache_fingerprint: str
    student_fingerprint: str
    heldout_fingerprint: str | None  # of the held-out traces' cache
    snapshots: Sequence[ShardList | None]  # of caches that were not complete when the run began

    def to_json(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return {
            "leadspan_run": _RUN_VERSION,
            "config": self.config.to_json(),
            "cache_fingerprint": self.cache_fingerprint,
            "student_fingerprint": self.student_fingerprint,
            "heldout_fingerprint": self.heldout_fingerprint,
            "snapshots": self.snapshots,
        }


class RunFolder:
    """Paths of a run's files, and the rules for starting and resuming."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is created.

        Raises:
            DamagedFileError: If it holds a run whose `config.json` is damaged.
            ValueError: If it holds something other than a run.
        """
        self.path = path
        self.config_file = path / "config.json"
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.checkpoints = path / "checkpoints"
        self.result_file = path / "result.json"
        self.model = path / "model"
        self._before = self._read_config()
        if self._before is None and path.exists() and not _holds_nothing(path):
            raise ValueError(
                f"{path}: expected a new or empty folder, or one of an earlier run, found other "
                "files; name another one"
            )

    def _read_config(self) -> dict[str, Any] | None:
        if not self.config_file.exists():
            return None
        text = self.config_file.read_bytes()
        is_ours = b"leadspan_run" in text or b"checksum" in text or self.checkpoints.exists()
        if not is_ours:
            return None  # a model's, say
        return read_record(
            self.config_file,
            "Without it, nobody knows whether the settings are those that the run began with: "
            "restore it from a copy, or begin the run again in another folder.",
        )

    @property
    def snapshots(self) -> list[ShardList | None] | None:
        """Cache snapshots of a run that can be resumed; see `open_data`."""
        if self._before is None or not self._can_resume:
            return None
        found = self._before.get("snapshots", [])
        return [shards and tuple((name, checksum) for name, checksum in shards) for shards in found]

    @property
    def finished(self) -> bool:
        """Whether the student has been written."""
        return self.model.exists()

    @property
    def _can_resume(self) -> bool:
        return self.finished or bool(self.checkpoint_folders())

    def checkpoint_folders(self) -> list[Path]:
        """Every complete checkpoint, the oldest first."""
        return sorted(self.checkpoints.glob("step-*"))

    def checkpoint_of(self, step: int) -> Path:
        """Path of the checkpoint after a step, if there is one."""
        return self.checkpoints / f"step-{step:09d}"

    def put_aside(self, checkpoint: Path) -> Path:
        """Rename a checkpoint so that it does not count, replacing an older one of that name."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if aside.exists():
            remove_folder(aside)
        checkpoint.rename(aside)
        return aside

    def check_identity(self, identity: RunIdentity) -> None:
        """Refuse to resume a different run.

        Raises:
            ValueError: If anything differs; it names every difference.
        """
        if self._before is None or not self._can_resume:
            return  # nothing to resume: the run begins anew
        now = identity.to_json()
        differences = [
            f"{name}: {self._before.get(name)!r} before, {now[name]!r} now"
            for name in ("cache_fingerprint", "student_fingerprint", "heldout_fingerprint")
            if self._before.get(name) != now[name]
        ]
        self._refuse([*differences, *self._changed_settings(identity.config)])

    def check_settings(self, config: TrainConfig) -> None:
        """Refuse to resume a run of other settings, before anything is loaded.

        Raises:
            ValueError: If a setting differs that may not; it names every difference.
        """
        if self._before is not None and self._can_resume:
            self._refuse(self._changed_settings(config))

    def _changed_settings(self, config: TrainConfig) -> list[str]:
        before = {} if self._before is None else self._before.get("config", {})
        changeable = changeable_names(TrainConfig)
        changed = [
            f"{name}: {before.get(name)!r} before, {value!r} now"
            for name, value in config.to_json().items()
            if name not in {*changeable, "epochs", "max_steps"}
            and before.get(name) != value
            and not (name == "dtype" and value is None)  # not decided yet
        ]
        return changed + self._different_length(config, before)

    def _refuse(self, differences: Sequence[str]) -> None:
        if differences:
            raise ValueError(
                f"{self.path} holds another run ({'; '.join(differences)}). "
                "Name another --out, or repeat that run's settings."
            )

    def _different_length(self, config: TrainConfig, before: Mapping[str, Any]) -> list[str]:
        """Differences in the length of the run, but for one that extends it as it may be."""
        now = {"epochs": config.epochs, "max_steps": config.max_steps}
        found = [name for name, value in now.items() if before.get(name) != value]
        is_longer = config.epochs >= before.get("epochs", 0) and (
            config.max_steps is None or (before.get("max_steps") or math.inf) <= config.max_steps
        )
        if not found or (is_longer and config.schedule == "constant"):
            return []
        reason = ""
        if is_longer:
            reason = (
                f" (--schedule {config.schedule} is laid out over all steps of a run from its "
                "start; only one of --schedule constant can be extended)"
            )
        return [f"{name}: {before.get(name)!r} before, {now[name]!r} now{reason}" for name in found]

    def extends(self, config: TrainConfig) -> bool:
        """Whether these settings are those of a longer run than the one that is here."""
        before = (self._before or {}).get("config", {})
        patience = before.get("patience")
        is_more_patient = patience is not None and (config.patience or math.inf) > patience
        length = (config.epochs, config.max_steps)
        return is_more_patient or (before.get("epochs"), before.get("max_steps")) != length

    def begin(self, identity: RunIdentity, mark: MetricsMark | None) -> str:
        """Make the folder ready: write the configuration, cut metrics back to the checkpoint.

        Args:
            identity: Identity of the run.
            mark: Mark of `metrics.jsonl` at the checkpoint, None for a new run.

        Returns:
            The run's id, by which trackers know it: a new one for a new run.
        """
        before = {} if mark is None or self._before is None else self._before
        run_id = str(before.get("run_id") or secrets.token_hex(8))
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unpublished(self.path)
        remove_unpublished(self.checkpoints)
        if self.finished:  # the run goes on: its student so far stays under another name
            step = read_record(self.result_file, "It belongs to the student.")["metrics"]["step"]
            self.model.rename(self.path / f"model-step-{step:09d}")
        publish_record(self.config_file, identity.to_json() | {"run_id": run_id})
        self.checkpoints.mkdir(exist_ok=True)  # second: without config.json they are a stranger's
        self.metrics.begin(mark)
        return run_id

    def write_result(self, metrics: Mapping[str, Any]) -> None:
        """Write the run's result, before the student gets its name."""
        publish_record(self.result_file, {"metrics": dict(metrics)})

    def read_result(self) -> dict[str, Any]:
        """The last step's metrics of a finished run, whose student is verified.

        Raises:
            DamagedFileError: If metrics or student are damaged.
        """
        remedy = (
            f"Restore it from a copy; or remove {self.model} and run the same command again, which "
            "writes the student again from the last checkpoint."
        )
        check_folder(self.model, remedy)
        metrics: dict[str, Any] = read_record(self.result_file, remedy)["metrics"]
        return metrics


def _holds_nothing(folder: Path) -> bool:
    """Whether it holds only a lock, or remains of a run that failed as it began."""
    names = (path.name for path in folder.iterdir())
    return all(
        name == LOCK_NAME or name.startswith((_UNPUBLISHED_CONFIG, SEEN_PREFIX)) for name in names
    )


def student_of(name: str) -> str:
    """The model folder that a user means: for a run's folder, its finished student.

    Raises:
        ValueError: If the run has none yet.
    """
    folder = Path(name)
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return name
    if not isinstance(record, dict) or "leadspan_run" not in record:
        return name
    if not (folder / "model").is_dir():
        raise ValueError(f"{name}: a run that is not finished: it has no student yet")
    return str(folder / "model")
