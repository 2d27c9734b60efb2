"""ForeignTrace: one trace as another program stored it, before it is checked.

Letters: n tokens, R rows (distributions), K entries per row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines.server.answers import NO_LOGPROB
from teacher_cache.sources import BadRow, Reason, SourceTrace


@dataclass(frozen=True, eq=False)
class ForeignTrace:
    """Token ids and top-k rows, in whatever order and place they had.

    Attributes:
        token_ids: [n] the whole sequence.
        top_ids: [R, K] candidates of each row; the realised token may be among them or not.
        values: [R, K] their logprobs or logits; -inf where there is no entry.
        first_token: Token that row 0 belongs to; None if the rows do not say.
        num_prompt: Tokens of the prompt; None if the row does not say.
        suffix: End of the id, where one row of the input holds several traces.
        finish_reason: What the server said; None if it is not known.
        used: Columns that are no fields of the user's.
        source: The trace as `score` renders it, where the row has messages instead of tokens.
    """

    token_ids: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    values: NDArray[np.float32]
    first_token: int | None = None
    num_prompt: int | None = None
    suffix: str = ""
    finish_reason: str | None = None
    used: tuple[str, ...] = ()
    source: SourceTrace | None = None


def token_array(value: object, name: str) -> NDArray[np.int32]:
    """[n] ids of a column; raises BadRow if it is not a list of token ids."""
    if not isinstance(value, list) or not value:
        raise BadRow(Reason.BAD_TOKEN_IDS, f"`{name}` must be a list of token ids")
    ids = np.array(value)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 31:
        raise BadRow(Reason.BAD_TOKEN_IDS, f"`{name}` must be a flat list of token ids")
    return ids.astype(np.int32)


def rows_from_lists(
    top_ids: object, values: object, names: tuple[str, str]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Two columns of lists of lists, as arrays [R, K]; rows may be null, or of several lengths.

    Args:
        top_ids: Ids of each row.
        values: Logprobs or logits beside them; null is none.
        names: Names of both columns.

    Raises:
        BadRow: If they are of other shapes.
    """
    if not isinstance(top_ids, list) or not isinstance(values, list) or len(top_ids) != len(values):
        raise BadRow(
            Reason.BAD_DISTRIBUTIONS,
            f"`{names[0]}` and `{names[1]}` must be lists with as many rows, got "
            f"{_length(top_ids)} and {_length(values)}",
        )
    rows: list[tuple[Sequence[int], Sequence[float | None]]] = []
    for number, (some_ids, some_values) in enumerate(zip(top_ids, values, strict=True)):
        pair = (some_ids or [], some_values or [])
        if not all(isinstance(item, list) for item in pair) or len(pair[0]) != len(pair[1]):
            raise BadRow(
                Reason.BAD_DISTRIBUTIONS,
                f"row {number}: expected as many ids as values, got {_length(some_ids)} and "
                f"{_length(some_values)}",
            )
        rows.append(pair)
    return _padded(rows)


def rows_from_maps(
    rows: Sequence[Mapping[int, float]],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Maps from token id to logprob, as arrays [R, K]."""
    return _padded([(list(row), list(row.values())) for row in rows])


def _padded(
    rows: Sequence[tuple[Sequence[int], Sequence[float | None]]],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    width = max((len(ids) for ids, _ in rows), default=0)
    top_ids = np.zeros((len(rows), width), np.int32)
    values = np.full((len(rows), width), -np.inf, np.float32)
    try:
        for number, (some_ids, some_values) in enumerate(rows):
            top_ids[number, : len(some_ids)] = some_ids
            values[number, : len(some_ids)] = [-np.inf if v is None else v for v in some_values]
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRow(
            Reason.BAD_DISTRIBUTIONS, f"a row's ids or values are not numbers: {error}"
        ) from error
    values[np.isnan(values) | (values <= NO_LOGPROB)] = -np.inf
    return top_ids, values


def _length(value: object) -> str:
    return f"{len(value):,}" if isinstance(value, list) else type(value).__name__
