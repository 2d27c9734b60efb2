"""The cache on disk: numpy, pyarrow and zstandard only. SPEC.md describes the bytes."""

from teacher_cache.format.bands import (
    bands_of_tokens,
    lead_span_length,
    lead_span_lengths,
    num_bands_needed,
)
from teacher_cache.format.catalog import Catalog
from teacher_cache.format.codec import (
    LOGIT_GRID,
    TAIL_FLOOR,
    KeepPolicy,
    KeptEntries,
    keep_entries,
    stored_logprobs,
)
from teacher_cache.format.commit import ShardCommit, TraceInfo
from teacher_cache.format.errors import (
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    TraceNotFoundError,
)
from teacher_cache.format.header import CacheHeader, content_hash, tokenizer_fingerprint
from teacher_cache.format.manifest import Manifest, Seal, ShardList
from teacher_cache.format.noise import NoiseFloor
from teacher_cache.format.ragged import entry_offsets, row_of_entry, tail_mass
from teacher_cache.format.reading.places import Places, rows_by_shard
from teacher_cache.format.reading.prefix_cache import PrefixCache
from teacher_cache.format.reading.reader import Cache, open_cache
from teacher_cache.format.reading.view import narrowed
from teacher_cache.format.records import read_manifest, require_same_capture
from teacher_cache.format.shares import (
    InputShare,
    ShareRecord,
    parse_worker,
    publish_share,
    read_shares,
    shares_to_come,
)
from teacher_cache.format.store import CachePath, Store, open_store, shown
from teacher_cache.format.trace import MAX_K, OPTIONAL_COLUMNS, SECTIONS, TokenLogprobs, Trace
from teacher_cache.format.writing.journal import FinishedTrace
from teacher_cache.format.writing.sealing import compact_journals, seal_cache
from teacher_cache.format.writing.writer import CacheWriter

__all__ = [
    "LOGIT_GRID",
    "MAX_K",
    "OPTIONAL_COLUMNS",
    "SECTIONS",
    "TAIL_FLOOR",
    "Cache",
    "CacheError",
    "CacheFormatError",
    "CacheHeader",
    "CacheMismatchError",
    "CachePath",
    "CacheWriter",
    "Catalog",
    "FinishedTrace",
    "InputShare",
    "KeepPolicy",
    "KeptEntries",
    "Manifest",
    "NoiseFloor",
    "Places",
    "PrefixCache",
    "Seal",
    "ShardCommit",
    "ShardList",
    "ShareRecord",
    "Store",
    "TokenLogprobs",
    "Trace",
    "TraceInfo",
    "TraceNotFoundError",
    "bands_of_tokens",
    "compact_journals",
    "content_hash",
    "entry_offsets",
    "keep_entries",
    "lead_span_length",
    "lead_span_lengths",
    "narrowed",
    "num_bands_needed",
    "open_cache",
    "open_store",
    "parse_worker",
    "publish_share",
    "read_manifest",
    "read_shares",
    "require_same_capture",
    "row_of_entry",
    "rows_by_shard",
    "seal_cache",
    "shares_to_come",
    "shown",
    "stored_logprobs",
    "tail_mass",
    "tokenizer_fingerprint",
]
