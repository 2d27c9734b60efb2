"""What the rows of an input mean: found on its first traces, before anything is written."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.sources import BadRow, Input, Reason, SourceError, row_values
from teacher_cache.transform.importing.axolotl import is_prepared
from teacher_cache.transform.importing.configs import ImportConfig
from teacher_cache.transform.importing.convert import (
    EXACT_EXCESS,
    FITTED_EXCESS,
    Meaning,
    log_sums,
)
from teacher_cache.transform.importing.distillkit import DistillKit
from teacher_cache.transform.importing.foreign import ForeignTrace
from teacher_cache.transform.importing.placing import found_shift

Parse = Callable[[Mapping[str, Any]], list[ForeignTrace]]
_NUM_LOOKED_AT = 32  # first traces, which tell what the rows mean
# Rows whose sums are all this close to 1, though none of them is sure of its token, were divided by
# their sums: of a real distribution something is left over.
_RENORMALISED = 1e-5
_FEWEST_UNSURE, _SURE = 16, 0.9
# Of values in half precision: the median distance of the sums from 1, and the share above it.
_ROUNDED, _ABOVE, _ABOVE_SHARE = 2e-3, 1e-6, 0.2


def values_of(rows: Input) -> Iterator[dict[str, Any]]:
    """The rows' values by column; rows that are no objects are left to the import to count."""
    for row in rows:
        try:
            yield row_values(row)
        except BadRow:
            continue


def parsed(parse: Parse, values: Mapping[str, Any]) -> list[ForeignTrace]:
    """The traces of one row.

    Raises:
        BadRow: If the row is not as its format has it, in whatever way.
    """
    try:
        return parse(values)
    except (BadRow, SourceError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise BadRow(
            Reason.BAD_DISTRIBUTIONS, f"not as its format has it: {error!r:.200}"
        ) from error


def found_meaning(config: ImportConfig, rows: Input, parse: Parse) -> Meaning:
    """Find on the first traces where rows stand and whether they tell their tails.

    Raises:
        SourceError: If no trace can be read, they fit their tokens nowhere, or they do not tell
            their tails under `--tail known`.
    """
    traces: list[ForeignTrace] = []
    last: BadRow | None = None
    has_tails = config.tail == "known"
    for values in islice(values_of(rows), 2 * _NUM_LOOKED_AT):
        try:
            traces += parsed(parse, values)
        except BadRow as error:
            last = error
        if has_tails and config.format == "axolotl" and is_prepared(values):
            raise SourceError(
                f"{rows.path}: `axolotl preprocess` divides every row by its sum, so the "
                "probability outside the entries is lost. Import the rows it was given, or these "
                "with --tail unknown"
            )
        if len(traces) >= _NUM_LOOKED_AT:
            break
    if not traces:
        raise SourceError(f"{rows.path}: no row can be imported: {last or 'there is none'}")
    try:
        shift = found_shift(traces) if config.row_shift is None else config.row_shift
    except SourceError as error:
        raise SourceError(f"{rows.path}: {error}") from error
    is_fitted = isinstance(parse, DistillKit)
    if has_tails:
        is_logits = is_fitted and isinstance(parse, DistillKit) and parse.is_legacy
        _require_tails(rows.path, traces, is_logits=is_logits, is_fitted=is_fitted)
    return Meaning(shift, has_tails, FITTED_EXCESS if is_fitted else EXACT_EXCESS)


def _require_tails(
    path: Path, traces: list[ForeignTrace], *, is_logits: bool, is_fitted: bool
) -> None:
    """Refuse rows that do not tell the mass outside their entries.

    Raises:
        SourceError: If they are logits, or were divided by their sums.
    """
    if is_logits:
        raise SourceError(
            f"{path}: rows of DistillKit's older kind are logits less their mean, without a "
            "normaliser: the probability outside the entries is not in them. Import them with "
            "--tail unknown"
        )
    finite = [t.values[np.isfinite(t.values).any(axis=1)] for t in traces if t.values.size]
    sums = np.concatenate([log_sums(values) for values in finite] or [np.zeros(0)])
    largest = np.concatenate([values.max(axis=1) for values in finite] or [np.zeros(0)])
    if len(sums) and (np.expm1(sums) > FITTED_EXCESS).mean() > 1 / 2:
        raise SourceError(
            f"{path}: the entries' probabilities add up to {np.exp(np.median(sums)):.4g} in the "
            "median row: these are no logprobs. If they are logits: --values logits"
        )
    unsure = sums[largest < np.log(_SURE)]
    if len(unsure) >= _FEWEST_UNSURE and _are_divided(np.expm1(unsure), is_fitted=is_fitted):
        raise SourceError(
            f"{path}: in the {len(unsure):,} rows that are not sure of their token the entries "
            "add up to 1, as exactly as they are stored: they were divided by their sums, and the "
            "probability outside them is lost. Import them with --tail unknown"
        )


def _are_divided(excess: NDArray[np.float64], *, is_fitted: bool) -> bool:
    """Whether rows with these sums less 1 were divided by their sums.

    In half precision rounding moves the sums to both sides of 1; those of logprobs stay below.
    DistillKit's fit does the same to all rows, so that it tells nothing there.
    """
    size = np.abs(excess)
    if (size < _RENORMALISED).all():
        return True
    is_rounded = np.median(size) < _ROUNDED and (excess > _ABOVE).mean() > _ABOVE_SHARE
    return bool(is_rounded and not is_fitted)
