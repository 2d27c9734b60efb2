"""Findings of a check of a cache."""

from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.format.header import CacheHeader


@dataclass(frozen=True)
class Finding:
    """A finding about one file of a cache."""

    file: str  # below the cache's folder
    text: str


@dataclass
class Verification:
    """Contents of a cache, and everything that is wrong with it."""

    path: str
    sealed: bool = False
    header: CacheHeader | None = None  # a shard's, where `cache.json` is damaged
    num_shards: int = 0
    num_traces: int = 0  # each counted once
    num_duplicates: int = 0
    num_tokens: int = 0  # tokens held by the traces that count
    num_entries: int = 0
    num_bytes: int = 0  # size of the shards
    num_journalled: int = 0  # traces that wait in journals
    errors: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)  # left by a crash or a running writer

    def wrong(self, file: str, text: object) -> None:
        """List an error; a reader's message already starts with the file's name."""
        said = str(text)
        for prefix in (f"{file}: ", f"{Path(file).name}: ", f"shard {Path(file).stem}: "):
            said = said.removeprefix(prefix)
        self.errors.append(Finding(file, said))

    def note(self, file: str, text: str) -> None:
        """List something worth knowing that is not an error."""
        self.notes.append(Finding(file, text))
