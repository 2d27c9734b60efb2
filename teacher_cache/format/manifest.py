"""`cache.json`: the header of a cache and, when it is complete, the seal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.format.commit import PLAIN_NAME, FileDigest
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import (
    FORMAT_NAME,
    FORMAT_VERSION,
    UNUSABLE_JSON,
    CacheHeader,
    content_hash,
)
from teacher_cache.format.noise import NoiseFloor, parse_noise

MANIFEST_NAME = "cache.json"
SHARD_FOLDER = "shards"
JOURNAL_FOLDER = "journal"

ShardList = tuple[tuple[str, str], ...]  # (name, commit checksum) of each shard, sorted by name


@dataclass(frozen=True)
class Seal:
    """Contents of a complete cache."""

    shards: ShardList
    num_traces: int  # each trace counted once
    num_tokens: int
    num_duplicates: int  # traces captured by two workers; the first shard's counts
    catalog: FileDigest | None = None  # of catalog.parquet; None in a cache of before it

    @property
    def fingerprint(self) -> str:
        """Identity of the cache's content, part of every cursor."""
        return shards_fingerprint(self.shards)


def shards_fingerprint(shards: Sequence[tuple[str, str]]) -> str:
    """Hash of a list of (shard name, commit checksum)."""
    return content_hash([list(pair) for pair in shards])


@dataclass(frozen=True)
class Manifest:
    """Contents of `cache.json`."""

    header: CacheHeader
    config: Mapping[str, Any]  # the resolved configuration of the capture that made the folder
    seal: Seal | None = None
    noise: NoiseFloor | None = None  # measured at the capture; set with the seal

    def to_bytes(self) -> bytes:
        """The file's content."""
        record: dict[str, Any] = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "min_reader_version": FORMAT_VERSION,
            "header": self.header.to_json(),
            "config": self.config,
            "complete": self.seal is not None,
        }
        if self.seal is not None:
            record["seal"] = {**asdict(self.seal), "fingerprint": self.seal.fingerprint}
            if self.seal.catalog is None:
                del record["seal"]["catalog"]
        if self.noise is not None:
            record["noise"] = asdict(self.noise)
        record["checksum"] = content_hash(json.loads(json.dumps(record)))  # as a reader will see it
        return (json.dumps(record, indent=1) + "\n").encode()


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read a `cache.json`.

    Raises:
        CacheFormatError: If it is not one, or has a version that this reader does not support.
    """
    try:
        record = json.loads(text.decode())  # of bytes, it would take UTF-16 too
        if record["format"] != FORMAT_NAME:
            raise CacheFormatError(f"{where}: expected format {FORMAT_NAME!r}")
        if type(record["min_reader_version"]) is not int:
            raise CacheFormatError(f"{where}: min_reader_version must be a whole number")
        if not isinstance(record["config"], dict):
            raise CacheFormatError(f"{where}: expected a JSON object as `config`")
        if record["min_reader_version"] > FORMAT_VERSION:
            raise CacheFormatError(
                f"{where}: needs a reader of format version {record['min_reader_version']}, this "
                f"leadspan reads up to {FORMAT_VERSION}. Install a newer leadspan."
            )
        header = CacheHeader.from_json(record["header"], where)
        seal = None
        if record["complete"]:
            seal = _parse_seal(record["seal"], where)
        noise = parse_noise(record["noise"]) if "noise" in record else None
        return Manifest(header, record["config"], seal, noise)
    except UNUSABLE_JSON as error:
        raise CacheFormatError(f"{where}: not a cache header: {error!r}") from error


def _parse_seal(record: Mapping[str, Any], where: str) -> Seal:
    catalog = record.get("catalog")
    seal = Seal(
        shards=tuple((str(name), str(checksum)) for name, checksum in record["shards"]),
        num_traces=int(record["num_traces"]),
        num_tokens=int(record["num_tokens"]),
        num_duplicates=int(record["num_duplicates"]),
        catalog=None if catalog is None else _parse_digest(catalog),
    )
    names = [name for name, _ in seal.shards]
    for name in names:
        if not PLAIN_NAME.match(name):
            raise CacheFormatError(f"{where}: {name!r} is not a valid shard name")
    if names != sorted(set(names)):
        raise CacheFormatError(f"{where}: the seal must list every shard once, sorted by name")
    if record["fingerprint"] != seal.fingerprint:
        raise CacheFormatError(f"{where}: the seal's fingerprint does not match its shards")
    return seal


def _parse_digest(record: Mapping[str, Any]) -> FileDigest:
    return FileDigest(int(record["size_bytes"]), str(record["sha256"]))
