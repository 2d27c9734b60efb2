"""Rows with plain columns: token ids, the top-k ids of each token, and their logprobs or logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.sources import BadRow, Reason
from teacher_cache.transform.importing.foreign import ForeignTrace, rows_from_lists, token_array

_NO_LABEL = -100  # of a token that is not trained on, in Hugging Face's `labels`


@dataclass(frozen=True)
class Columns:
    """Names of the columns."""

    token_ids: str
    top_ids: str
    values: str
    log_normaliser: str | None = None  # of logits: log of the sum of exp(logit) over all ids
    num_prompt: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> list[ForeignTrace]:
        """The row's trace; raises BadRow."""
        missing = [name for name in self._names if name not in row]
        if missing:
            raise BadRow(
                Reason.UNKNOWN_COLUMNS,
                f"expected columns {', '.join(self._names)}, not found: {', '.join(missing)}",
            )
        tokens = token_array(row[self.token_ids], self.token_ids)
        top_ids, values = rows_from_lists(
            row[self.top_ids], row[self.values], (self.top_ids, self.values)
        )
        if self.log_normaliser is not None:
            normaliser = np.array(row[self.log_normaliser], np.float64)
            if normaliser.shape != (len(values),):
                raise BadRow(
                    Reason.BAD_DISTRIBUTIONS,
                    f"`{self.log_normaliser}` must have a number for each of {len(values)} rows",
                )
            values = (values - normaliser[:, None]).astype(np.float32)
        return [
            ForeignTrace(
                tokens, top_ids, values, num_prompt=self._num_prompt(row), used=self._used(row)
            )
        ]

    @property
    def _names(self) -> tuple[str, ...]:
        names = (self.token_ids, self.top_ids, self.values, self.log_normaliser, self.num_prompt)
        return tuple(name for name in names if name is not None)

    def _used(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        of_trainers = ("labels", "attention_mask", "target_mask", "position_ids", "length")
        ours = ("cot_start", "answer_start", "tail_mass")  # of `export --logprobs`
        return (*self._names, *(name for name in (*of_trainers, *ours) if name in row))

    def _num_prompt(self, row: Mapping[str, Any]) -> int | None:
        if self.num_prompt is not None:
            given = row[self.num_prompt]
            if type(given) is not int or given < 0:
                raise BadRow(
                    Reason.BAD_BOUNDS,
                    f"`{self.num_prompt}` must be a number of tokens, got {given!r}",
                )
            return given
        labels = row.get("labels")
        if isinstance(labels, list) and any(label != _NO_LABEL for label in labels):
            return next(i for i, label in enumerate(labels) if label != _NO_LABEL)
        return None


# What `axolotl preprocess` writes with the `kd` plugin's chat templates.
AXOLOTL = Columns("input_ids", "target_token_ids", "target_logprobs")
# DistillKit's without compression.
DISTILLKIT_PLAIN = Columns("input_ids", "token_ids", "top_values")
