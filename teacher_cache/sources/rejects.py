"""Rows that cannot be used: reasons, counts, and the list kept beside the cache."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from teacher_cache.format import Store

logger = logging.getLogger(__name__)


class SourceError(ValueError):
    """The input cannot be used; the message names the file, the row and the reason."""


class Reason(StrEnum):
    """Why a row was left out; these names appear in `rejects.jsonl` and do not change."""

    NOT_JSON = "not-json"
    NOT_UTF8 = "not-utf-8"
    NOT_AN_OBJECT = "not-an-object"
    FIELD_NOT_JSON = "field-not-json"
    FIELD_RESERVED = "field-reserved"
    UNKNOWN_COLUMNS = "unknown-columns"
    BAD_ID = "bad-id"
    DUPLICATE_ID = "duplicate-id"
    BAD_PROMPT = "bad-prompt"
    EMPTY_PROMPT = "empty-prompt"
    BAD_MESSAGES = "bad-messages"
    UNKNOWN_ROLE = "unknown-role"
    TEMPLATE_REFUSES = "template-refuses"
    BAD_TEMPLATE_ARGS = "bad-template-args"
    MARKS_UNKNOWN = "marks-unknown"
    THINKING_IS_OFF = "thinking-is-off"
    TURNS_NOT_FOUND = "turns-not-found"
    NO_ASSISTANT_TURN = "no-assistant-turn"
    TOOL_CALLS = "tool-calls"
    BAD_RESPONSE = "bad-response"
    EMPTY_RESPONSE = "empty-response"
    EMPTY_CHAIN_OF_THOUGHT = "empty-chain-of-thought"
    UNCLOSED_CHAIN_OF_THOUGHT = "unclosed-chain-of-thought"
    MARKS_OUT_OF_ORDER = "marks-out-of-order"
    BAD_TOKEN_IDS = "bad-token-ids"
    BAD_BOUNDS = "bad-bounds"
    SECOND_BEGIN_TOKEN = "second-begin-token"
    TOKEN_OUTSIDE_VOCABULARY = "token-outside-vocabulary"
    PROMPT_TOO_LONG = "prompt-too-long"
    TRACE_TOO_SHORT = "trace-too-short"
    TRACE_TOO_LONG = "trace-too-long"
    # Reasons of `retokenize`.
    NO_ROW = "no-row"
    NOTHING_HELD = "nothing-held"
    TOKEN_WITHOUT_COUNTERPART = "token-without-counterpart"
    TEXT_CHANGES = "text-changes"
    # Reasons of `import`.
    BAD_DISTRIBUTIONS = "bad-distributions"
    NOT_NORMALISED = "not-normalised"
    ROWS_OF_OTHER_TOKENS = "rows-of-other-tokens"
    # Reasons of rollouts.
    OTHER_ROLLOUT = "other-rollout"
    BAD_LOGPROBS = "bad-logprobs"
    PROMPT_DIFFERS = "prompt-differs"


class BadRow(ValueError):
    """A row that cannot be used."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Make the error; the message says what was expected and found, not where."""
        super().__init__(message)
        self.reason = reason


@dataclass
class Rejects:
    """The rows left out in one pass over the input."""

    counts: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, str] = field(default_factory=dict)  # the first of each reason
    ids: set[str] = field(default_factory=set)  # of the rows that have one
    _lines: bytearray = field(default_factory=bytearray)  # kept encoded: there may be many

    def add(self, file: str, number: int, trace_id: str | None, error: BadRow) -> None:
        """Record one row; `trace_id` is None if it is unknown."""
        self.counts[error.reason] += 1
        self.examples.setdefault(error.reason, f"{file}:{number}: {error}")
        if trace_id is not None:
            self.ids.add(trace_id)
        line = {
            "file": file,
            "row": number,
            "id": trace_id,
            "reason": error.reason,
            "message": str(error),
        }
        self._lines += json.dumps(line).encode() + b"\n"

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        lines = self._lines.decode()
        return {
            "counts": self.counts, "examples": self.examples, "ids": sorted(self.ids),
            "lines": lines,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Rejects":
        """What `to_json` gave."""
        counts = Counter({Reason(name): count for name, count in values["counts"].items()})
        examples = {Reason(name): text for name, text in values["examples"].items()}
        return cls(counts, examples, set(values["ids"]), bytearray(values["lines"].encode()))

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return self.counts.total()

    def most_frequent(self) -> str:
        """The most frequent reason, with its count and an example; requires at least one reject."""
        ((reason, count),) = self.counts.most_common(1)
        return f"{count:,} of {self.total:,} rows: {reason}, e.g. {self.examples[reason]}"

    def publish(self, store: Store, name: str) -> None:
        """Write the list (JSONL: file, row, id, reason, message), and log a summary.

        The file is complete or absent; an earlier one is removed if nothing is left out now.
        """
        if not self.total:
            store.remove(name)
            return
        store.make_folder("")
        store.publish(name, bytes(self._lines))
        for reason, count in self.counts.most_common():
            logger.warning("left out: %d rows, %s, e.g. %s", count, reason, self.examples[reason])
        logger.warning("all %d rows left out are listed in %s/%s", self.total, store.where, name)
