"""Reading a cache: commit records first, then only the prefix of a shard that is needed.

Every block that is read is checked against its crc32, and every value against the format, before
anything is handed out.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from teacher_cache.format.commit import (
    PLAIN_NAME,
    ShardCommit,
    TraceInfo,
    check_commit,
    parse_commit,
)
from teacher_cache.format.decode import assemble, decode_bands
from teacher_cache.format.errors import CacheError, CacheFormatError, CacheMismatchError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    Manifest,
    parse_manifest,
    shards_fingerprint,
)
from teacher_cache.format.span import num_bands_needed
from teacher_cache.format.trace import Trace


@dataclass
class Cache:
    """An open cache: an immutable snapshot of its commit records, and access to its shards."""

    path: str
    manifest: Manifest
    shards: tuple[ShardCommit, ...]  # by name
    traces: tuple[tuple[int, int], ...]  # (shard, row) of every trace, each counted once
    fingerprint: str  # of the shards' content
    filesystem: pafs.FileSystem
    root: str
    bytes_read: int = 0  # from shards, by this object

    @property
    def header(self) -> CacheHeader:
        """Provenance and policy."""
        return self.manifest.header

    @property
    def sealed(self) -> bool:
        """Whether the capture is complete."""
        return self.manifest.seal is not None

    def num_held(self, trace: TraceInfo) -> int:
        """How many of its first tokens can be read: all, unless the cache was truncated."""
        return self.header.num_held(trace.n_total)

    def read(self, shard_index: int, keep: Mapping[int, int]) -> dict[int, Trace]:
        """Read the first tokens of some traces of one shard.

        The bytes read are one prefix of the file: the leading bands that hold these tokens.

        Args:
            shard_index: Index into `shards`.
            keep: Row in the shard -> how many of its tokens, 1 to n_total.

        Returns:
            Row -> its trace, cut to the tokens asked for.

        Raises:
            CacheFormatError: If the shard is missing, damaged, or not what its record says.
            CacheMismatchError: If `keep` asks for tokens that a truncated cache does not hold.
            ValueError: If `keep` asks for tokens that a trace does not have.
        """
        commit = self.shards[shard_index]
        where = f"{self.path}: shard {commit.name}.arrow"
        for row, num_tokens in keep.items():
            if not 1 <= num_tokens <= commit.traces[row].n_total:
                raise ValueError(
                    f"{where}: trace {commit.traces[row].trace_id!r} has "
                    f"{commit.traces[row].n_total} tokens, {num_tokens} were asked for"
                )
        held = {row: self.num_held(commit.traces[row]) for row in keep}
        for row, num_tokens in keep.items():
            if num_tokens > held[row]:
                raise CacheMismatchError(
                    f"{where}: the cache was truncated to a lead span of "
                    f"{self.header.max_lead_span:g} and holds {held[row]} tokens of trace "
                    f"{commit.traces[row].trace_id!r}, {num_tokens} were asked for. Train on at "
                    "most this lead span, or on the cache that it was made from."
                )
        spans = ((held[row], count) for row, count in keep.items())
        num_bands = num_bands_needed(spans, len(commit.blocks))
        data = self._read_prefix(commit, num_bands, where)
        bands = decode_bands(data, commit, num_bands, self.header, where)
        return {row: assemble(commit, row, count, bands, where) for row, count in keep.items()}

    def _read_prefix(self, commit: ShardCommit, num_bands: int, where: str) -> pa.Buffer:
        size = commit.prefix_bytes(num_bands)
        try:
            with self.filesystem.open_input_file(f"{self.root}/{_shard_file(commit)}") as file:
                data = file.read_buffer(size)
        except OSError as error:
            raise CacheFormatError(f"{where}: cannot be read: {error}") from error
        self.bytes_read += len(data)
        if len(data) != size:
            raise CacheFormatError(f"{where}: expected {size} bytes, the file ends at {len(data)}")
        view = memoryview(data)
        for band, block in enumerate(commit.blocks[:num_bands]):
            found = zlib.crc32(view[block.offset : block.offset + block.length])
            if found != block.crc32:
                raise CacheFormatError(
                    f"{where}: band {band} is damaged (crc32 {found:08x}, expected "
                    f"{block.crc32:08x}). Restore the file from a copy, or capture again "
                    "into another folder."
                )
        return data


def open_cache(path: str, *, allow_unsealed: bool = False) -> Cache:
    """Open a cache for reading.

    Args:
        path: A folder, or a URI that pyarrow.fs knows (s3://, gs://, hdfs://, file://).
        allow_unsealed: Take a snapshot of the shards committed so far where the capture is not
            complete.

    Raises:
        CacheFormatError: If there is no cache, or a commit record or shard is missing or damaged.
        CacheMismatchError: If the cache is not sealed and that was not allowed.
    """
    filesystem, root = open_filesystem(path)
    file = f"{root}/{MANIFEST_NAME}"
    if filesystem.get_file_info(file).type != pafs.FileType.File:
        raise CacheFormatError(f"{path}: no cache here (expected a file {MANIFEST_NAME})")
    manifest = parse_manifest(_read_file(filesystem, file), f"{path}/{MANIFEST_NAME}")
    if manifest.seal is None and not allow_unsealed:
        raise CacheMismatchError(
            f"{path}: the capture is not complete (no seal). Run cache-teacher again to finish it, "
            "seal what is there with `cache-teacher seal`, or read what is committed so far with "
            "--allow-unsealed."
        )
    if manifest.seal is not None:
        names = [name for name, _ in manifest.seal.shards]
    else:
        names = _committed_names(filesystem, root)
    commits = [_read_commit(filesystem, root, name, manifest, path) for name in names]
    if manifest.seal is not None:
        for commit, (name, checksum) in zip(commits, manifest.seal.shards, strict=True):
            if commit.checksum != checksum:
                raise CacheFormatError(f"{path}: the commit record of {name} is not the sealed one")
    _check_shard_files(filesystem, root, commits, path)
    return Cache(
        path=path,
        manifest=manifest,
        shards=tuple(commits),
        traces=_each_trace_once(commits),
        fingerprint=shards_fingerprint([(c.name, c.checksum) for c in commits]),
        filesystem=filesystem,
        root=root,
    )


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder or URI, and the folder's path there.

    Raises:
        CacheError: If there is none.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), path.rstrip("/") or "/"
    try:
        filesystem, root = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CacheError(f"{path}: cannot be opened: {error}") from error
    if not root.strip("/"):
        raise CacheError(f"{path}: expected a bucket and a folder")
    return filesystem, root.rstrip("/")


def _read_file(filesystem: pafs.FileSystem, file: str) -> bytes:
    with filesystem.open_input_file(file) as source:
        return bytes(source.read())


def _committed_names(filesystem: pafs.FileSystem, root: str) -> list[str]:
    selector = pafs.FileSelector(f"{root}/{SHARD_FOLDER}", allow_not_found=True)
    files = (info.base_name for info in filesystem.get_file_info(selector))
    return sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))


def _read_commit(
    filesystem: pafs.FileSystem, root: str, name: str, manifest: Manifest, path: str
) -> ShardCommit:
    file = f"{root}/{SHARD_FOLDER}/{name}.json"
    if not PLAIN_NAME.match(name):
        raise CacheFormatError(f"{path}: {name!r} is no name of a shard")
    if filesystem.get_file_info(file).type != pafs.FileType.File:
        raise CacheFormatError(f"{path}: the commit record of shard {name!r} is missing")
    commit = parse_commit(_read_file(filesystem, file), name)
    check_commit(commit, manifest.header)
    return commit


def _check_shard_files(
    filesystem: pafs.FileSystem, root: str, commits: Sequence[ShardCommit], path: str
) -> None:
    files = [f"{root}/{_shard_file(commit)}" for commit in commits]
    for commit, info in zip(commits, filesystem.get_file_info(files), strict=True):
        if info.type != pafs.FileType.File:
            raise CacheFormatError(
                f"{path}: shard {commit.name}.arrow is missing. Restore it from a copy, or "
                "capture its traces again into another folder."
            )
        if info.size != commit.size_bytes:
            raise CacheFormatError(
                f"{path}: shard {commit.name}.arrow has {info.size} bytes, expected "
                f"{commit.size_bytes}; it is damaged or not fully copied"
            )


def _each_trace_once(commits: Sequence[ShardCommit]) -> tuple[tuple[int, int], ...]:
    seen = set()
    once = []
    for shard_index, commit in enumerate(commits):
        for row, trace in enumerate(commit.traces):
            if trace.trace_id not in seen:
                seen.add(trace.trace_id)
                once.append((shard_index, row))
    return tuple(once)


def _shard_file(commit: ShardCommit) -> str:
    return f"{SHARD_FOLDER}/{commit.name}.arrow"
