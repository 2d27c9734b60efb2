"""The folder of a run: what it is, how far it is, what came out.

config.json      the resolved configuration and what was trained on what
metrics.jsonl    one object per logged step
checkpoints/     the last ones, and the best
tensorboard/     the same figures for TensorBoard
model/           the student as a Hugging Face folder; there when the run is finished
lock             held by the main process while it is at work; see folder_lock
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.run.config import TrainConfig
from teacher_cache.format import ShardList
from teacher_cache.format.files import publish, remove_unpublished
from teacher_cache.format.folder_lock import LOCK_NAME
from teacher_cache.terminal.option import changeable_names

_RUN_VERSION = 1
_UNPUBLISHED_CONFIG = ".tmp-config.json-"


@dataclass(frozen=True)
class RunIdentity:
    """What must stay the same for a run to be gone on with."""

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
    """Paths of a run's files, and the rules of beginning and going on."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is made.

        Raises:
            ValueError: If it holds something else than a run.
        """
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._before = self._read_config()
        if self._before is None and path.exists() and not _holds_nothing(path):
            raise ValueError(
                f"{path}: expected a new or empty folder, or one of an earlier run, found other "
                "files; name another one"
            )

    def _read_config(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) and "leadspan_run" in record else None

    @property
    def snapshots(self) -> list[ShardList | None] | None:
        """What a run that can be gone on with was begun on; see `open_data`."""
        if self._before is None or not (self.finished or self.latest_checkpoint):
            return None
        found = self._before.get("snapshots", [])
        return [shards and tuple((name, checksum) for name, checksum in shards) for shards in found]

    @property
    def finished(self) -> bool:
        """Whether the student has been written."""
        return self.model.exists()

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def checkpoint_of(self, step: int) -> Path:
        """Where the checkpoint after a step is, if there is one."""
        return self.checkpoints / f"step-{step:09d}"

    def check_identity(self, identity: RunIdentity) -> None:
        """Refuse to go on with a run that was another one.

        Raises:
            ValueError: Naming every difference.
        """
        if self._before is None or not (self.finished or self.latest_checkpoint):
            return  # nothing to go on with: the run begins anew
        now = identity.to_json()
        differences = [
            f"{name}: {self._before.get(name)!r} before, {now[name]!r} now"
            for name in ("cache_fingerprint", "student_fingerprint", "heldout_fingerprint")
            if self._before.get(name) != now[name]
        ]
        changeable = changeable_names(TrainConfig)
        before_config = self._before.get("config", {})
        differences += [
            f"{name}: {before_config.get(name)!r} before, {value!r} now"
            for name, value in now["config"].items()
            if name not in changeable and before_config.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{self.path} holds another run ({'; '.join(differences)}). "
                "Name another --out, or repeat that run's settings."
            )

    def begin(self, identity: RunIdentity, metrics_bytes: int) -> None:
        """Make the folder ready: configuration written, metrics cut back to the checkpoint.

        Args:
            identity: Of the run.
            metrics_bytes: Length of `metrics.jsonl` at the checkpoint, 0 for a new run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unpublished(self.path)
        remove_unpublished(self.checkpoints)
        publish(self.config_file, (json.dumps(identity.to_json(), indent=1) + "\n").encode())
        self.checkpoints.mkdir(exist_ok=True)  # second: without config.json they are a stranger's
        with self.metrics_file.open("ab") as file:
            file.truncate(metrics_bytes)

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def last_metrics(self) -> dict[str, Any]:
        """The last line of `metrics.jsonl`."""
        return self._metrics()[-1]

    def metrics_of(self, step: int) -> dict[str, Any]:
        """The line of a step that was logged."""
        return next(values for values in self._metrics() if values["step"] == step)

    def _metrics(self) -> list[dict[str, Any]]:
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def _holds_nothing(folder: Path) -> bool:
    """Nothing but a lock, or what a run left that was killed, or had no disk, as it began."""
    names = (path.name for path in folder.iterdir())
    return all(name == LOCK_NAME or name.startswith(_UNPUBLISHED_CONFIG) for name in names)
