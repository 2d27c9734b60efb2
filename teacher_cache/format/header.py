"""CacheHeader: a cache's facts in `cache.json`, and the fingerprints that compare them."""

import hashlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any

from teacher_cache.format.bands import lead_span_length
from teacher_cache.format.errors import CacheFormatError

FORMAT_NAME = "leadspan-cache"
FORMAT_VERSION = 1

# Errors raised when JSON of unknown shape is read as a header.
UNUSABLE_JSON = (
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """Provenance and policy of a cache, repeated in every shard's schema metadata.

    Two captures with equal headers may write into one cache.
    """

    mode: str  # "generate" or "score"
    teacher: str  # path or hub id, as the user gave it
    teacher_revision: str | None
    teacher_fingerprint: str  # fingerprint of the weights
    engine: str
    engine_version: str
    dtype: str
    head_dtype: str
    vocab_size: int  # width of the teacher's softmax, padding included
    tokenizer_size: int
    tokenizer_fingerprint: str
    chat_template_hash: str
    think_open_ids: tuple[int, ...]  # the mark that begins a chain of thought
    think_close_ids: tuple[int, ...]
    terminal_token_ids: tuple[int, ...]  # each of them ends a generated trace
    sampling: Mapping[str, float | int | None] | None  # None if traces were given
    top_k: int
    mass: float
    capture_prompt: bool
    num_bands: int
    max_lead_span: float = 1.0  # part of every trace that is kept; of a mixture the largest
    # Mixture from which `truncate` drew the part of each trace: its `spans` in writing, the `seed`.
    lead_spans: Mapping[str, Any] | None = None
    # Everything else that changes numbers, as the engine reports it (quantisation, ...).
    teacher_settings: Mapping[str, Any] | None = None
    chat_template: str | Mapping[str, str] | None = None  # or several, by name
    chat_template_args: Mapping[str, Any] | None = None
    special_tokens: Mapping[str, str] | None = None  # the tokenizer's `eos_token`, ...
    added_tokens: Mapping[str, Any] | None = None  # token -> {"id": int, "special": bool}
    turn_layout: Mapping[str, Any] | None = None  # how the template lays out a turn
    derived: Mapping[str, Any] | None = None  # source and settings of `retokenize`
    imported: Mapping[str, Any] | None = None  # what `import` read, and whether it had the tails
    rollout: Mapping[str, Any] | None = None  # the student whose own traces these are, the round

    @property
    def has_chunks(self) -> bool:
        """Whether traces have the likelihoods of chunks that both tokenizers write."""
        return self.derived is not None and self.derived.get("chunks") is True

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Names of the columns of a trace, a float32 per token, that only some caches have."""
        has = {"chunk_logprob": self.has_chunks, "student_logprob": self.rollout is not None}
        return tuple(name for name, is_there in has.items() if is_there)

    @property
    def is_truncated(self) -> bool:
        """Whether the cache may hold less than all of a trace."""
        return self.max_lead_span < 1.0 or self.lead_spans is not None

    @property
    def held_part(self) -> str:
        """What a truncated cache holds of its traces, in words."""
        if self.lead_spans is None:
            return f"a lead span of {self.max_lead_span:g}"
        return f"the mixture {self.lead_spans['spans']} of seed {self.lead_spans['seed']}"

    @property
    def held_options(self) -> str:
        """What can be trained on, in words."""
        if self.lead_spans is None:
            return "at most this lead span"
        spans, seed = self.lead_spans["spans"], self.lead_spans["seed"]
        return f"--lead-span {spans} with --seed {seed}, or at most the shortest of these spans"

    @property
    def has_tails(self) -> bool:
        """Whether the mass outside the kept entries is the teacher's; a placeholder otherwise."""
        return self.imported is None or self.imported.get("tail") != "unknown"

    def num_held(self, n_total: int, n_held: int | None = None) -> int:
        """Number of leading tokens of a trace that the cache holds: all, unless truncated.

        Args:
            n_total: Tokens of the whole trace.
            n_held: Number that the trace's own record gives, in a cache of several lead spans.
        """
        if n_held is not None:
            return n_held
        if self.max_lead_span == 1.0:
            return n_total
        return lead_span_length(n_total, self.max_lead_span)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything above: captures that differ in any of it must not share a folder."""
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The header's part of `cache.json`; values at their defaults are left out."""
        defaults = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "CacheHeader":
        """Read what `to_json` wrote; unknown keys are ignored.

        Raises:
            CacheFormatError: If a key is missing or its value is invalid.
        """
        known: dict[str, Any] = {}
        for item in fields(cls):
            if item.name not in values and item.default is MISSING:
                raise CacheFormatError(f"{where}: expected a header with {item.name!r}, not found")
            value = values.get(item.name, item.default)
            known[item.name] = tuple(value) if isinstance(value, list) else value
            if not _is_possible(item.name, known[item.name]):
                raise CacheFormatError(
                    f"{where}: {item.name} = {reprlib.repr(value)} is not a valid value"
                )
        return cls(**known)

    def differences(self, other: "CacheHeader") -> list[str]:
        """List `name: other there, this now` for every fact in which a stored header differs."""
        return [
            f"{name}: {reprlib.repr(that)} there, {reprlib.repr(this)} now"
            for name, this, that in self._facts_beside(other)
            if this != that
        ]

    def _facts_beside(self, other: "CacheHeader") -> Iterator[tuple[str, Any, Any]]:
        """Every fact of two headers, mappings key by key."""
        for item in fields(self):
            this, that = getattr(self, item.name), getattr(other, item.name)
            if isinstance(this, Mapping) and isinstance(that, Mapping):
                for key in sorted(this.keys() | that.keys()):
                    yield f"{item.name}.{key}", this.get(key), that.get(key)
            else:
                yield item.name, this, that


_MAPPINGS = (
    *("sampling", "teacher_settings", "chat_template_args"),
    *("special_tokens", "added_tokens", "turn_layout", "derived", "imported", "rollout"),
)


def _is_possible(name: str, value: object) -> bool:
    """Whether a header, which anyone may have written, can have this value."""
    if name in ("vocab_size", "tokenizer_size"):
        return type(value) is int and 0 <= value < 1 << 31
    if name in ("num_bands", "top_k"):
        return type(value) is int and 1 <= value <= 255
    if name in ("mass", "max_lead_span"):
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return name == "mass" or 0 < value <= 1
    if name.endswith("_ids"):
        return isinstance(value, tuple) and all(type(token) is int for token in value)
    if name == "added_tokens" and isinstance(value, dict):
        return all(
            isinstance(facts, dict) and type(facts.get("id")) is int and "special" in facts
            for facts in value.values()
        )
    if name == "lead_spans" and isinstance(value, dict):
        return isinstance(value.get("spans"), str) and type(value.get("seed")) is int
    if name in (*_MAPPINGS, "lead_spans"):
        return value is None or isinstance(value, dict)
    if name == "chat_template":
        return value is None or isinstance(value, str | dict)
    if name == "capture_prompt":
        return isinstance(value, bool)
    return isinstance(value, str) or (name == "teacher_revision" and value is None)


def canonical_json(value: object) -> bytes:
    """Canonical JSON, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def content_hash(value: object) -> str:
    """First 16 bytes of the sha256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


def tokenizer_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Hash of a tokenizer's map from token to id; equal for tokenizers whose ids mean the same."""
    return content_hash(sorted((token_id, token) for token, token_id in vocabulary.items()))
