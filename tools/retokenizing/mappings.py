"""What others do to carry distributions to another tokenizer, as derivations to compare with.

Where they have no distribution for a token, it gets all its mass: the hard label, at full weight.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import open_cache
from teacher_cache.transform.retokenize import convert
from teacher_cache.transform.retokenize.alignment import Batch, expand, summed
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.distribution import Contributions, Derivation
from teacher_cache.transform.retokenize.joints import NONE
from teacher_cache.transform.retokenize.run import retokenize

Array = NDArray[np.generic]


@dataclass(frozen=True)
class _Entries:
    """The teacher's entries where a token of the student begins with one of the teacher's."""

    row: NDArray[np.int64]
    entry_ids: NDArray[np.int64]
    mass: NDArray[np.float64]
    first: NDArray[np.int32]  # the student's first token of each entry's bytes
    is_realised: NDArray[np.bool_]


class FirstToken(Derivation):
    """Every entry goes to the first token of its bytes; no look ahead, nothing inside tokens."""

    def __call__(self, batch: Batch) -> Contributions:
        """Distribute the mass of one level per token."""
        found = self._entries(batch)
        return _rows(batch, found, found.first.astype(np.int64))

    def _entries(self, batch: Batch) -> _Entries:
        row, place = expand(np.where(batch.depth == 0, batch.k[batch.level], 0))
        level = batch.level[row]
        entry = batch.first_entry[level] + place
        ids = batch.entry_ids[entry]
        start = np.full(len(ids), self._joints.nothing)
        _, first = self._joints.after(start, ids, np.full(len(ids), NONE), ids)
        return _Entries(row, ids, batch.entry_probs[entry], first, ids == batch.teacher_ids[level])


class EqualStrings(FirstToken):
    """Entries go to the token of the same bytes, where both write the same token here."""

    def __call__(self, batch: Batch) -> Contributions:
        """Distribute the mass of the entries that the student has as tokens."""
        found = self._entries(batch)
        lengths = np.array([len(text) for text in self._student])
        is_same = lengths[found.first] == self.teacher_lengths[found.entry_ids]
        is_same &= found.first != NONE
        both = np.zeros(len(batch.student_ids), bool)
        both[found.row[found.is_realised & is_same]] = True
        both &= (batch.last == batch.level) & batch.ends_on
        token = np.where(is_same & both[found.row], found.first, NONE)
        return _rows(batch, found, token.astype(np.int64))


def _rows(batch: Batch, found: _Entries, token: NDArray[np.int64]) -> Contributions:
    """Distributions in which the target occurs; elsewhere the target has all mass."""
    num_rows = len(batch.student_ids)
    is_told = token != NONE
    has_target = np.zeros(num_rows, bool)
    has_target[found.row[is_told & (token == batch.student_ids[found.row])]] = True
    is_told &= has_target[found.row]
    is_lost = ~is_told & has_target[found.row]
    tail = np.where(has_target, batch.tail[batch.level], 0.0)
    tail += summed(found.row[is_lost], found.mass[is_lost], num_rows)
    hard = np.flatnonzero(~has_target)
    everywhere = np.ones(num_rows, bool)
    return Contributions(
        row=np.concatenate([found.row[is_told], hard]),
        token=np.concatenate([token[is_told], batch.student_ids[hard]]),
        mass=np.concatenate([found.mass[is_told], np.ones(len(hard))]),
        tail=tail,
        has_row=everywhere,
        is_plain=everywhere,
        path=np.ones(num_rows),  # their certificates mean nothing
    )


DERIVATIONS = {"derived": Derivation, "first token": FirstToken, "equal strings": EqualStrings}


def derive(name: str, config: RetokenizeConfig) -> float:
    """Write a student's cache by one of `DERIVATIONS`; return its share of soft labels."""
    before = convert.Derivation
    convert.Derivation = DERIVATIONS[name]  # type: ignore[misc]  # of the same interface
    try:
        retokenize(replace(config, processes=1))
    finally:
        convert.Derivation = before  # type: ignore[misc]
    cache = open_cache(config.out)
    soft, num_tokens = 0, 0
    for trace in cache.read_held(cache.traces):
        k = trace.k[trace.cot_start :]
        hard = (k == 0) | ((k == 1) & (trace.tail[trace.cot_start :] < 1e-6))
        soft, num_tokens = soft + int((~hard).sum()), num_tokens + len(k)
    return soft / num_tokens


def folder_of(out: Path, name: str) -> Path:
    """Folder of an arm's cache."""
    return out / name.replace(" ", "-")
