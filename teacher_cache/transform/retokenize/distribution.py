"""The teacher's distribution over the student's next token.

A token of the student begins at byte a of the text, inside the teacher's token i ("level" i) or at
its start. The cache holds what the teacher could say there, and along the text actually
written, at the next levels. Every way the text could continue gives its mass to one token:

1. An entry of level i that is not the target: to the student's next token if the text continued
   with the entry's bytes. Entries with which the student's last token would have become another
   are impossible now, since that token is fixed: they are left out and the rest is renormalised.
   Inside a token, so are entries that do not begin with the bytes already written.
2. The target's mass passes to level i + 1, and so on to the level that ends the student's
   token: an entry there gives its share to the first token of the bytes so far and its own.
3. After the token's end, if a level begins there: entries with which the token would merge
   into another one take their share of its mass (what 1 leaves out for the next token).
4. Mass outside the kept entries, and that of entries that end inside the student's token or that
   the student cannot write, is the tail.

The masses of 3 and 1 are the same entries, so the chain rule holds: the product over the tokens
of the mass along the actual text is the product of the teacher's own probabilities.

Letters: M tokens of the student, C contributions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.transform.retokenize.alignment import Batch, expand, summed
from teacher_cache.transform.retokenize.joints import NONE, Joints
from teacher_cache.transform.retokenize.token_bytes import special_of

# Largest share of the mass inside a teacher's token that may be unaccounted for.
MAX_UNKNOWN = 0.05


@dataclass(frozen=True)
class Contributions:
    """Masses of the student's tokens, not summed yet: C of them, in no order."""

    row: NDArray[np.int64]  # [C] which of the M tokens the distribution belongs to
    token: NDArray[np.int64]  # [C]
    mass: NDArray[np.float64]  # [C]
    tail: NDArray[np.float64]  # [M] mass of no known token; with the masses it sums to 1
    has_row: NDArray[np.bool_]  # [M] whether there is a distribution
    is_plain: NDArray[np.bool_]  # [M] whether it is a single distribution of the teacher
    path: NDArray[np.float64]  # [M] the target token's mass along the actual text


@dataclass(frozen=True)
class _Level:
    """The entries of the level at which each token begins, and their effect on the joint."""

    row: NDArray[np.int64]
    entry: NDArray[np.int64]
    is_realised: NDArray[np.bool_]
    merged: NDArray[np.int32]  # the token that would replace the last one
    token: NDArray[np.int32]
    is_open: NDArray[np.bool_]  # ends at or before the joint, with unknown continuation
    is_out: NDArray[np.bool_]  # does not begin with the bytes already written


class Derivation:
    """Computes distributions of batches for one pair of tokenizers."""

    def __init__(self, joints: Joints, texts: list[bytes | None], student: list[bytes]) -> None:
        """Prepare what every batch needs.

        Args:
            joints: Joints of the two tokenizers.
            texts: Text of each of the teacher's ids; None if the student cannot write it.
            student: Bytes of each of the student's ids, stand-ins for special ones.
        """
        self._joints = joints
        self._texts = [text or b"" for text in texts]
        self._student = student
        lengths = np.array([len(text) for text in self._texts], np.int64)
        self.teacher_lengths = lengths
        self._flat = np.frombuffer(b"".join(self._texts), np.uint8)
        self._offsets = np.cumsum(lengths) - lengths
        # Nothing reaches across the edge of a special token.
        self._left = np.arange(joints.nothing + 1)
        is_special = [not text or special_of(text) is not None for text in student]
        self._left[: len(student)][is_special] = joints.nothing

    def __call__(self, batch: Batch) -> Contributions:
        """Distribute all mass over the student's tokens."""
        level = self._first_level(batch)
        num_rows = len(batch.student_ids)
        probs = batch.entry_probs[level.entry]

        def total(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
            return summed(level.row[chosen], probs[chosen], num_rows)

        is_other = ~level.is_realised & ~level.is_out & ~level.is_open
        excluded = total(is_other & (level.merged != NONE))
        unknown = batch.tail[batch.level] + total(level.is_open)
        left = 1.0 - excluded - total(level.is_out)
        has_row = self._has_all_levels(batch)
        with np.errstate(divide="ignore", invalid="ignore"):
            has_row &= (batch.depth == 0) | (unknown <= MAX_UNKNOWN * left)
        has_row &= left > 0

        # Part of a token's mass, which the next token leaves out.
        moves = self._moves_from_next(batch)
        stays = np.ones(num_rows)
        stays[moves] = 1.0 - excluded[moves + 1]
        reach = np.exp(batch.log_realised(batch.level, batch.last + 1))

        token = np.where(level.is_realised, batch.student_ids[level.row], level.token)
        own = np.maximum(reach * stays, np.finfo(np.float64).tiny)  # it is always kept
        mass = np.where(level.is_realised, own[level.row], probs)
        goes_on = (is_other & (level.merged == NONE)) | level.is_realised
        rows, tokens, masses = [level.row[goes_on]], [token[goes_on]], [mass[goes_on]]
        taken = np.flatnonzero(is_other & (level.merged != NONE) & (batch.depth[level.row] == 0))
        taken = taken[self._is_after(moves, num_rows)[level.row[taken]]]
        before = level.row[taken] - 1
        rows.append(before)
        tokens.append(level.merged[taken])
        masses.append(reach[before] * probs[taken])

        tail = unknown
        inner = self._inner_levels(batch, has_row)
        if inner is not None:
            rows.append(inner.row)
            tokens.append(inner.token)
            masses.append(inner.mass)
            tail = tail + inner.tail
        row, token, mass = np.concatenate(rows), np.concatenate(tokens), np.concatenate(masses)
        told = token != NONE
        tail = tail + summed(row[~told], mass[~told], num_rows)
        is_kept = told & has_row[row]
        row, token, mass = row[is_kept], token[is_kept].astype(np.int64), mass[is_kept]
        is_plain = (batch.last == batch.level) & (batch.depth == 0) & (excluded == 0)
        is_plain[before] = False
        with np.errstate(divide="ignore", invalid="ignore"):
            return Contributions(
                row=row,
                token=token,
                mass=mass / left[row],
                tail=np.where(has_row, tail / left, 0.0),
                has_row=has_row,
                is_plain=is_plain,
                path=np.where(has_row, own / left, 0.0),
            )

    def _has_all_levels(self, batch: Batch) -> NDArray[np.bool_]:
        """[M] whether the teacher has a distribution at every level that a token lies in."""
        missing = np.concatenate([[0], np.cumsum(batch.k == 0)])
        has_all: NDArray[np.bool_] = missing[batch.last + 1] == missing[batch.level]
        return has_all

    def _moves_from_next(self, batch: Batch) -> NDArray[np.int64]:
        """Rows whose token could still merge with what the teacher says next."""
        next_row = np.arange(1, len(batch.student_ids))
        same = batch.student_response[next_row] == batch.student_response[next_row - 1]
        has_level = batch.k[batch.level[next_row]] > 0
        return np.flatnonzero(same & has_level & batch.ends_on[next_row - 1])

    @staticmethod
    def _is_after(moves: NDArray[np.int64], num_rows: int) -> NDArray[np.bool_]:
        is_after = np.zeros(num_rows, bool)
        is_after[moves + 1] = True
        return is_after

    def _first_level(self, batch: Batch) -> _Level:
        row, place = expand(batch.k[batch.level])
        level = batch.level[row]
        entry = batch.first_entry[level] + place
        right = batch.entry_ids[entry]
        is_realised = right == batch.teacher_ids[level]
        is_first = np.ones(len(batch.student_ids), bool)
        is_first[1:] = batch.student_response[1:] != batch.student_response[:-1]
        left = np.concatenate([[self._joints.nothing], self._left[batch.student_ids[:-1]]])
        left[is_first] = self._joints.nothing
        teacher_left = np.where((batch.depth == 0) & ~is_first, batch.level - 1, NONE)
        teacher_left = np.where(teacher_left == NONE, NONE, batch.teacher_ids[teacher_left])

        is_open, is_out = np.zeros(len(row), bool), np.zeros(len(row), bool)
        inside = np.flatnonzero((batch.depth[row] > 0) & ~is_realised)
        right_string = right
        if len(inside):
            begins, is_longer = self._begins_alike(
                right[inside], batch.teacher_ids[level[inside]], batch.depth[row[inside]]
            )
            is_out[inside] = ~begins
            is_open[inside] = begins & ~is_longer
            rest = inside[begins & is_longer]
            pairs = zip(right[rest].tolist(), batch.depth[row[rest]].tolist(), strict=True)
            right_string = right.copy()
            right_string[rest] = self._joints.right_of([self._texts[e][d:] for e, d in pairs])
        asked = np.flatnonzero(~is_realised & ~is_open & ~is_out)
        merged, token = np.full(len(row), NONE, np.int32), np.full(len(row), NONE, np.int32)
        merged[asked], token[asked] = self._joints.after(
            left[row[asked]], right_string[asked], teacher_left[row[asked]], right[asked]
        )
        return _Level(row, entry, is_realised, merged, token, is_open, is_out)

    def _begins_alike(
        self, tokens: NDArray[np.int64], like: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether tokens agree with the others' first `depth` bytes, and whether they are longer.

        `depth` is less than the others' lengths.
        """
        lengths = self.teacher_lengths[tokens]
        common = np.minimum(lengths, depth)
        alike = lengths > 0  # a token the student cannot write has an unknown continuation
        alike_rows = np.flatnonzero(alike)
        position = 0
        while len(alike_rows):
            rows = alike_rows = alike_rows[common[alike_rows] > position]
            ours = self._flat[self._offsets[tokens[rows]] + position]
            theirs = self._flat[self._offsets[like[rows]] + position]
            alike[rows[ours != theirs]] = False
            alike_rows = rows[ours == theirs]
            position += 1
        return alike, lengths > depth

    def _inner_levels(self, batch: Batch, has_row: NDArray[np.bool_]) -> "_Inner | None":
        """Levels after the first that a token lies in."""
        rows = np.flatnonzero(has_row & (batch.last > batch.level))
        if not len(rows):
            return None
        of_row, step = expand((batch.last - batch.level)[rows])
        row = rows[of_row]
        level = batch.level[row] + 1 + step
        reach = np.exp(batch.log_realised(batch.level[row], level))
        tail = summed(row, reach * batch.tail[level], len(has_row))
        num_bytes = batch.teacher_starts[level] - batch.student_starts[row]
        pairs = zip(batch.student_ids[row].tolist(), num_bytes.tolist(), strict=True)
        left = self._joints.left_of([self._student[token][:length] for token, length in pairs])

        of_level, place = expand(batch.k[level])
        entry = batch.first_entry[level][of_level] + place
        other = batch.entry_ids[entry] != batch.teacher_ids[level][of_level]
        of_level, entry = of_level[other], entry[other]
        right = batch.entry_ids[entry]
        token = self._joints.first(left[of_level], right)
        # For text the student cannot write, the bytes and any merges are unknown.
        token[self.teacher_lengths[right] == 0] = NONE
        mass = reach[of_level] * batch.entry_probs[entry]
        return _Inner(row[of_level], token, mass, tail)


@dataclass(frozen=True)
class _Inner:
    row: NDArray[np.int64]
    token: NDArray[np.int32]
    mass: NDArray[np.float64]
    tail: NDArray[np.float64]  # [M]
