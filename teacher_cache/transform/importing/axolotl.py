"""Rows of Axolotl's `kd` plugin: those of its data sets, and those of `axolotl preprocess`.

Raw rows are a conversation and `logprobs`, one list per token of the response: of objects with
`token` ("token_id:17") and `logprob`, or of numbers beside `target_token_ids`. Its tokens are those
of the chat template, so they are rendered here as for `score`.

Prepared rows have `input_ids`, `target_token_ids` and `target_logprobs`. Their writer divides every
row by its sum, so the mass outside the entries is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.engines.server.answers import TOKEN_ID
from teacher_cache.sources import BadRow, Reason, TraceRenderer
from teacher_cache.transform.importing.columns import AXOLOTL
from teacher_cache.transform.importing.foreign import ForeignTrace, rows_from_lists

_IDS_COLUMN = "target_token_ids"


def is_prepared(row: Mapping[str, Any]) -> bool:
    """Whether `axolotl preprocess` wrote a row."""
    return "target_logprobs" in row and "input_ids" in row


@dataclass(frozen=True)
class AxolotlRows:
    """Reads rows of either kind."""

    render: TraceRenderer
    is_prepared: bool  # the kind of the first row, which all are to be
    logprobs: str = "logprobs"  # column of raw rows (Axolotl's `logprobs_field`)

    def __call__(self, row: Mapping[str, Any]) -> list[ForeignTrace]:
        """The row's trace; raises BadRow."""
        if is_prepared(row) != self.is_prepared:
            kinds = ("raw, with a conversation", "of `axolotl preprocess`")
            raise BadRow(
                Reason.UNKNOWN_COLUMNS,
                f"expected a row as the first is, {kinds[self.is_prepared]}; this one is not: "
                "import both kinds apart",
            )
        if self.is_prepared:
            return AXOLOTL(row)
        given = row.get(self.logprobs)
        if not isinstance(given, list) or not given:
            raise BadRow(
                Reason.UNKNOWN_COLUMNS,
                f"expected a list `{self.logprobs}` beside a conversation, or the columns of "
                "`axolotl preprocess` (input_ids, target_token_ids, target_logprobs)",
            )
        if _IDS_COLUMN in row:
            top_ids, values = rows_from_lists(row[_IDS_COLUMN], given, (_IDS_COLUMN, self.logprobs))
        else:
            ids = [[_id_of(entry) for entry in entries or []] for entries in given]
            logprobs = [[entry["logprob"] for entry in entries or []] for entries in given]
            top_ids, values = rows_from_lists(ids, logprobs, ("token", "logprob"))
        used = (self.logprobs, _IDS_COLUMN)
        source = self.render({name: value for name, value in row.items() if name not in used})
        tokens = np.array(source.token_ids, np.int32)
        return [
            ForeignTrace(
                tokens, top_ids, values, first_token=source.num_prompt,
                num_prompt=source.num_prompt, source=source,
            )
        ]  # fmt: skip


def _id_of(entry: object) -> int:
    token = entry.get("token") if isinstance(entry, dict) else None
    number = token.removeprefix(TOKEN_ID) if isinstance(token, str) else ""
    if not (number.isdecimal() and isinstance(entry, dict) and "logprob" in entry):
        raise BadRow(
            Reason.BAD_DISTRIBUTIONS,
            f'expected entries like {{"token": "token_id:17", "logprob": -0.5}}, got {entry!r:.80}',
        )
    return int(number)
