"""Sources of rows: a file of any kind, a folder of files, a saved dataset, the hub."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from teacher_cache.format.files import is_utf8
from teacher_cache.sources.json_files import text_rows
from teacher_cache.sources.rejects import SourceError
from teacher_cache.sources.row import Row
from teacher_cache.sources.tables import (
    ARROW_FILE_MAGIC,
    ARROW_STREAM_MAGIC,
    PARQUET_MAGIC,
    plain,
    saved_dataset_files,
    table_rows,
)

logger = logging.getLogger(__name__)

_KIND_OF_SUFFIX = {
    ".jsonl": "text", ".ndjson": "text", ".json": "text", ".gz": "text", ".zst": "text",
    ".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow", ".ipc": "Arrow",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_HEAD_BYTES = 8


@dataclass(frozen=True)
class Input:
    """The input that `--prompts` or `--traces` names; iterating reads it from the start."""

    path: Path  # a file, a folder, or a hub id
    dataset_config: str | None = None  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset or a saved one

    def __iter__(self) -> Iterator[Row]:
        """Yield every row, in the order of file names and of rows in a file.

        Raises:
            SourceError: If part of the input cannot be read to its end.
        """
        try:
            if self.path.is_dir():
                for file in self._files_of_folder:
                    yield from _file_rows(file)
            elif self.path.exists() or not self._may_be_hub_id():
                yield from _file_rows(self.path)
            else:
                yield from self._hub_rows()
        except OSError as error:
            raise SourceError(
                f"{error.filename or self.path}: cannot be read: {error.strerror or error}"
            ) from error

    @cached_property
    def _files_of_folder(self) -> list[Path]:
        saved = saved_dataset_files(self.path, self.split)
        if saved is not None:
            return saved
        files = sorted(f for f in self.path.rglob("*") if f.is_file() and not self._is_hidden(f))
        known = [file for file in files if file.suffix in _KIND_OF_SUFFIX]
        if not known:
            raise SourceError(
                f"{self.path}: expected files ending in {', '.join(_KIND_OF_SUFFIX)} or a folder "
                "saved by `datasets`, found none"
            )
        for file in sorted(set(files) - set(known)):
            logger.info("%s: skipped, its name is not that of a file of rows", file)
        return known

    @property
    def may_be_hub_id(self) -> bool:
        """Whether nothing local has this name and it could be a name on the hub."""
        return not self.path.exists() and self._may_be_hub_id()

    def check_exists(self, hint: str = "") -> None:
        """Refuse a path that is missing and cannot be on the hub either.

        Args:
            hint: End of the message, with similar names.

        Raises:
            SourceError: If there is no such input, or the path is a device or a pipe.
        """
        if self.path.exists():
            if not self.path.is_dir():
                _check_is_file(self.path)
        elif not self._may_be_hub_id():
            raise SourceError(f"{self.path}: no such file or folder{hint}")

    def _is_hidden(self, file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(self.path).parts)

    def _may_be_hub_id(self) -> bool:
        return (
            _HUB_ID.fullmatch(str(self.path)) is not None
            and self.path.suffix not in _KIND_OF_SUFFIX
        )

    def _hub_rows(self) -> Iterator[Row]:
        where = f"{self.path} ({self.dataset_config or 'default'}, {self.split})"
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise SourceError(
                f"{self.path}: no such file or folder; for the hub: pip install datasets"
            ) from error
        try:
            rows = datasets.load_dataset(
                str(self.path), name=self.dataset_config, split=self.split, streaming=True
            )
            for number, row in enumerate(rows, start=1):
                yield Row(where, number, plain(row))
        # The library raises many kinds of errors, its own and those of HTTP clients.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise SourceError(
                f"{where}: no such file or folder here, and `datasets` says: {reason}"
            ) from error


def _check_is_file(path: Path) -> None:
    """Refuse inputs that could block forever; a missing file is reported elsewhere."""
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: expected a file, found a device or a pipe")


def _file_rows(path: Path) -> Iterator[Row]:
    """Rows of one file: its first bytes say what it is, and its name must agree."""
    _check_is_file(path)
    if not is_utf8(path):
        raise SourceError(f"{path}: the file's name is not UTF-8; rename it")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = "text"
    if head.startswith(PARQUET_MAGIC):
        kind = "Parquet"
    elif head.startswith((ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)):
        kind = "Arrow"
    expected = _KIND_OF_SUFFIX.get(path.suffix, kind)
    if kind != expected:
        raise SourceError(
            f"{path}: expected {expected} by its name, found {kind} by its content; the file is "
            "damaged or misnamed"
        )
    return text_rows(path, head) if kind == "text" else table_rows(path, head)
