"""One dataset repository of the Hugging Face Hub: what it holds, and commits to it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.format import CacheError

_HASHED_BYTES = 1 << 20
_REASON_CHARACTERS = 400


@dataclass(frozen=True)
class Outgoing:
    """A file to send: from the disk, or the bytes themselves."""

    name: str
    content: Path | bytes
    size_bytes: int
    sha256: str
    git_sha1: str  # of the blob, by which the Hub names files outside LFS

    @classmethod
    def of(cls, name: str, content: Path | bytes) -> "Outgoing":
        """Read the content once, for its hashes."""
        size_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size_bytes)
        for part in _parts(content):
            sha256.update(part)
            git.update(part)
        return cls(name, content, size_bytes, sha256.hexdigest(), git.hexdigest())

    def is_that(self, entry: Any) -> bool:  # noqa: ANN401  # huggingface_hub.RepoFile
        """Whether the Hub's entry is this very file."""
        if entry is None or entry.size != self.size_bytes:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == self.sha256)
        return bool(entry.blob_id == self.git_sha1)


def _parts(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while part := file.read(_HASHED_BYTES):
            yield part


class HubDataset:
    """A repository; every method raises CacheError if the Hub refuses or does not answer."""

    def __init__(self, uri: str, repository: str) -> None:
        """Take the name; nothing is asked yet.

        Args:
            uri: The repository's URI, for messages.
            repository: OWNER/NAME.
        """
        try:
            import huggingface_hub
            import huggingface_hub.errors
        except ModuleNotFoundError as error:
            raise CacheError(f"{uri}: pip install huggingface_hub") from error
        self._uri, self._repository = uri, repository
        self._library = huggingface_hub
        self._api = huggingface_hub.HfApi()

    def is_private(self) -> bool | None:
        """Whether the repository is private; None if there is none."""
        absent = self._library.errors.RepositoryNotFoundError

        def asked() -> bool | None:
            try:
                return bool(self._api.dataset_info(self._repository).private)
            except absent:
                return None

        found: bool | None = self._tried(asked)
        return found

    def make(self, *, private: bool) -> None:
        """Make the repository."""
        self._tried(
            lambda: self._api.create_repo(self._repository, repo_type="dataset", private=private)
        )

    def entries(self) -> dict[str, Any]:
        """The entries of all files of the repository, by name."""
        return {
            entry.path: entry
            for entry in self._tried(
                lambda: list(
                    self._api.list_repo_tree(self._repository, recursive=True, repo_type="dataset")
                )
            )
            if isinstance(entry, self._library.hf_api.RepoFile)
        }

    def text(self, name: str) -> str:
        """A small file of the repository."""
        path = self._tried(
            lambda: self._api.hf_hub_download(self._repository, name, repo_type="dataset")
        )
        return Path(path).read_bytes().decode(errors="replace")

    def send(self, files: Sequence[Outgoing]) -> None:
        """Send files in one commit."""
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
        # HTTP errors of the library are OSErrors; an upload that fails is a RuntimeError, whose
        # cause alone says why.
        except (OSError, ValueError, RuntimeError) as error:
            said = [str(each) for each in (error, error.__cause__) if each is not None]
            reason = " ".join(" ".join(said).split())[:_REASON_CHARACTERS] or type(error).__name__
            raise CacheError(
                f"{self._uri}: {reason} (run the same command again to resume; `hf auth login` "
                "gives it an account)"
            ) from error
