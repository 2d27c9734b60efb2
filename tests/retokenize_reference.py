"""The slow definition of a retokenised distribution, and exact ones of toy teachers.

Plain Python in float64 with a call of the tokenizer for every question; nothing here is shared
with, or taken from, the code under test. `student` and `teacher` are functions from bytes to a
list of ids, and `student_bytes`, `teacher_bytes` lists of the bytes of every id.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    """One distribution: masses of tokens that add up to one with the tail."""

    mass: dict
    tail: float
    path: float  # the realised token's, along the realised text alone


@dataclass
class Toy:
    """A pair of tokenizers."""

    student: object
    teacher: object
    student_bytes: list
    teacher_bytes: list
    namesakes: dict  # of the teacher's ids, the student's of the same name and bytes


def derive(toy, teacher_ids, rows, student_ids, max_unknown=0.05):
    """A Row, or None, for each of the student's tokens.

    Args:
        toy: The tokenizers.
        teacher_ids: The response in the teacher's tokens.
        rows: For each a pair of ({id: probability}, tail), or None where there is no distribution.
        student_ids: The same bytes in the student's tokens.
        max_unknown: Of a joint inside one of the teacher's tokens.
    """
    starts = np.cumsum([0, *(len(toy.teacher_bytes[t]) for t in teacher_ids)]).tolist()
    place, derived, before = 0, [], None
    for number, token in enumerate(student_ids):
        end = place + len(toy.student_bytes[token])
        following = student_ids[number + 1] if number + 1 < len(student_ids) else None
        derived.append(
            _row(
                toy, teacher_ids, rows, starts, (place, end), before, token, following, max_unknown
            )
        )
        place, before = end, token
    return derived


def joint(toy, before, teacher_before, entry, rest):
    """("merged", token), or ("next", token): what `rest` does behind the student's `before`."""
    alone = own_first(toy, entry, rest)
    if before is None or toy.student(toy.student_bytes[before]) != [before]:
        return "next", alone
    found = toy.student(toy.student_bytes[before] + rest)
    if found[0] == before and found[1] == alone:
        return "next", alone
    if teacher_before is not None:
        pair = toy.teacher_bytes[teacher_before] + toy.teacher_bytes[entry]
        if toy.teacher(pair) != [teacher_before, entry]:
            return "next", alone  # the teacher itself decided for a boundary
    return ("next", found[1]) if found[0] == before else ("merged", found[0])


def own_first(toy, entry, rest):
    """The student's first token of `rest`; what the teacher never writes keeps its name."""
    text = toy.teacher_bytes[entry]
    if rest == text and entry in toy.namesakes and toy.teacher(text) != [entry]:
        return toy.namesakes[entry]
    return toy.student(rest)[0]


def _row(toy, teacher_ids, rows, starts, span, before, token, following, max_unknown):
    place, end = span
    level = max(i for i, start in enumerate(starts[:-1]) if start <= place)
    last = next(i for i in range(level, len(teacher_ids)) if starts[i + 1] >= end)
    if any(rows[i] is None for i in range(level, last + 1)):
        return None
    depth = place - starts[level]
    probs, unknown = rows[level]
    teacher_before = teacher_ids[level - 1] if level > 0 and depth == 0 else None
    mass, left = {}, unknown
    realised = probs[teacher_ids[level]]
    left += realised
    written = toy.teacher_bytes[teacher_ids[level]][:depth]
    for entry, p in probs.items():
        if entry == teacher_ids[level]:
            continue
        text = toy.teacher_bytes[entry]
        if depth and written.startswith(text):
            unknown += p
            left += p
            continue
        if not text.startswith(written):
            continue
        kind, found = joint(toy, before, teacher_before, entry, text[depth:])
        if kind == "next":
            mass[found] = mass.get(found, 0.0) + p
            left += p
    if depth and unknown > max_unknown * left:
        return None
    reach, tail = realised, unknown
    for i in range(level + 1, last + 1):
        so_far = toy.student_bytes[token][: starts[i] - place]
        inner, inner_tail = rows[i]
        tail += reach * inner_tail
        for entry, p in inner.items():
            if entry != teacher_ids[i]:
                found = toy.student(so_far + toy.teacher_bytes[entry])[0]
                mass[found] = mass.get(found, 0.0) + reach * p
        reach *= inner[teacher_ids[i]]
    stays = 1.0
    if following is not None and starts[last + 1] == end and rows[last + 1] is not None:
        for entry, p in rows[last + 1][0].items():
            if entry != teacher_ids[last + 1]:
                text = toy.teacher_bytes[entry]
                kind, found = joint(toy, token, teacher_ids[last], entry, text)
                if kind == "merged":
                    mass[found] = mass.get(found, 0.0) + reach * p
                    stays -= p
    mass[token] = mass.get(token, 0.0) + reach * stays
    return Row({u: m / left for u, m in mass.items()}, tail / left, reach * stays / left)
