"""`cache-teacher push`: a sealed cache as a dataset on the Hugging Face Hub.

Files go in commits of a bounded size, `cache.json` last: a repository that was left half-way is not
a cache, and running the command again sends what is missing. What the Hub holds at the end is
compared, file by file, with what is here.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from teacher_cache.format import CacheError, CacheMismatchError, open_store
from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER
from teacher_cache.format.records import require_manifest
from teacher_cache.format.writing.card import CARD_NAME
from teacher_cache.terminal.option import check_options, option

_TARGET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)/?\Z")
_FILES_AT_ONCE, _BYTES_AT_ONCE = 64, 1 << 30  # of one commit
_PATHS_AT_ONCE = 200  # asked about in one request
_HASHED_BYTES = 1 << 20
_REASON_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """`cache-teacher push`."""

    cache: Path = option("Folder of the sealed cache.", is_argument=True)
    to: str = option("Repository, as hf://datasets/OWNER/NAME; made if missing.", is_argument=True)
    license: str | None = option(
        "License that the dataset card names, such as apache-2.0; the teacher's own may ask for "
        "one.",
        default=None,
        unset="none, or what the card says",
    )
    private: bool = option("Make a new repository private.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        if _TARGET.match(self.to) is None:
            raise ValueError(f"TO: expected hf://datasets/OWNER/NAME, got {self.to!r}")

    @property
    def repository(self) -> str:
        """OWNER/NAME."""
        return self.to.removeprefix("hf://datasets/").rstrip("/")


@dataclass(frozen=True)
class PushReport:
    """Report of a push."""

    num_files: int  # of the cache
    num_sent: int  # by this run; the others were there already
    num_bytes_sent: int


@dataclass(frozen=True)
class _Outgoing:
    """A file to send: from the disk, or the bytes themselves."""

    name: str
    content: Path | bytes
    size_bytes: int
    sha256: str
    git_sha1: str  # of the blob, by which the Hub names files outside LFS

    def is_that(self, entry: Any) -> bool:  # noqa: ANN401  # huggingface_hub.RepoFile
        """Whether the Hub's entry is this very file."""
        if entry is None or entry.size != self.size_bytes:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == self.sha256)
        return bool(entry.blob_id == self.git_sha1)


def push(
    config: PushConfig, on_file: Callable[[int, int], None] = lambda done, total: None
) -> PushReport:
    """Check a cache, send what the repository lacks of it, and compare.

    Args:
        config: The cache and the repository.
        on_file: Called with the number of files that are there, and of all.

    Raises:
        CacheMismatchError: If the cache is not sealed, or the Hub holds something else in the end.
        CacheError: If the cache is damaged, or the Hub refuses or does not answer.
    """
    store = open_store(config.cache)
    if require_manifest(store).seal is None:
        raise CacheMismatchError(f"{store.where}: not sealed; finish the capture, or seal it")
    errors = verify_cache(config.cache).errors
    if errors:
        raise CacheError(f"{store.where}: damaged, so not sent: {errors[0].file}: {errors[0].text}")
    files = [_outgoing(config, name) for name in _names(config.cache)]
    hub = _Hub(config)
    hub.make_repository()
    held = hub.entries(files)
    missing = [file for file in files if not file.is_that(held.get(file.name))]
    num_there = len(files) - len(missing)
    on_file(num_there, len(files))
    for batch in _batches(missing):
        hub.send(batch)
        num_there += len(batch)
        on_file(num_there, len(files))
    held = hub.entries(files)
    wrong = [file.name for file in files if not file.is_that(held.get(file.name))]
    if wrong:
        raise CacheMismatchError(
            f"{config.to}: holds another {wrong[0]} than was sent ({len(wrong)} files differ): "
            "someone else writes there; run the same command again"
        )
    return PushReport(len(files), len(missing), sum(file.size_bytes for file in missing))


def _names(cache: Path) -> list[str]:
    """Files of a sealed cache, `cache.json` last."""
    sealed = require_manifest(open_store(cache)).seal
    shards = [name for name, _ in sealed.shards] if sealed is not None else []
    names = [
        name
        for shard in shards
        for name in (
            f"{SHARD_FOLDER}/{shard}.arrow", f"{SHARD_FOLDER}/{shard}.json",
            f"messages/{shard}.arrow",
        )
        if (cache / name).exists()
    ]  # fmt: skip
    names += [name for name in (CATALOG_FILE, CARD_NAME) if (cache / name).exists()]
    return [*names, MANIFEST_NAME]


def _outgoing(config: PushConfig, name: str) -> _Outgoing:
    path = config.cache / name
    content: Path | bytes = path
    if name == CARD_NAME and config.license is not None:
        content = _licensed(path.read_text(), config.license).encode()
    size_bytes = len(content) if isinstance(content, bytes) else path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size_bytes)
    for part in _parts(content):
        sha256.update(part)
        git.update(part)
    return _Outgoing(name, content, size_bytes, sha256.hexdigest(), git.hexdigest())


def _parts(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while part := file.read(_HASHED_BYTES):
            yield part


def _licensed(card: str, license_: str) -> str:
    """The card with a license in its front matter."""
    lines = [line for line in card.splitlines() if not line.startswith("license:")]
    if lines[:1] != ["---"]:
        lines = ["---", "---", *lines]
    return "\n".join([lines[0], f"license: {license_}", *lines[1:]]) + "\n"


def _batches(files: Sequence[_Outgoing]) -> Iterator[list[_Outgoing]]:
    """Files of one commit each; `cache.json` alone and last."""
    batch: list[_Outgoing] = []
    for file in files:
        size_bytes = sum(each.size_bytes for each in batch) + file.size_bytes
        is_full = len(batch) == _FILES_AT_ONCE or size_bytes > _BYTES_AT_ONCE
        if batch and (is_full or file.name == MANIFEST_NAME):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


class _Hub:
    """One repository."""

    def __init__(self, config: PushConfig) -> None:
        try:
            import huggingface_hub
        except ModuleNotFoundError as error:
            raise CacheError(f"{config.to}: pip install huggingface_hub") from error
        self._to, self._repository, self._private = config.to, config.repository, config.private
        self._library = huggingface_hub
        self._api = huggingface_hub.HfApi()

    def make_repository(self) -> None:
        self._tried(
            lambda: self._api.create_repo(
                self._repository, repo_type="dataset", private=self._private, exist_ok=True
            )
        )

    def entries(self, files: Sequence[_Outgoing]) -> dict[str, Any]:
        """The repository's entries of these files, by name; those it lacks are left out."""
        names = [file.name for file in files]
        return {
            entry.path: entry
            for first in range(0, len(names), _PATHS_AT_ONCE)
            for entry in self._tried(
                partial(
                    self._api.get_paths_info,
                    self._repository,
                    names[first : first + _PATHS_AT_ONCE],
                    repo_type="dataset",
                )
            )
        }

    def send(self, files: Sequence[_Outgoing]) -> None:
        operations = [
            self._library.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content)
            for file in files
        ]
        self._tried(
            lambda: self._api.create_commit(
                self._repository,
                operations,
                commit_message=f"leadspan cache: {files[0].name} and {len(files) - 1} more",
                repo_type="dataset",
            )
        )

    def _tried(self, action: Callable[[], Any]) -> Any:  # noqa: ANN401  # of the library
        try:
            return action()
        except (OSError, ValueError) as error:  # HTTP errors of the library are OSErrors
            reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
            raise CacheError(
                f"{self._to}: {reason} (run the same command again to go on; `hf auth login` "
                "gives it an account)"
            ) from error
