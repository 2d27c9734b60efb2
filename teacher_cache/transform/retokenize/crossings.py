"""Where a tokenizer can merge across two texts: a numpy test without the tokenizer.

A token reaches across the joint of `x` and `y` only if it begins with an end of `x` and continues
with the first byte of `y`. For most pairs the vocabulary has no such token (a word and a space),
and then each side is split as if the other were absent.

Letters: X left strings, L bytes of all of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, and so invertible


class Crossings:
    """The bytes that could follow each end of a text within one token."""

    def __init__(self, vocabulary: Sequence[bytes | None]) -> None:
        """Record every prefix of every token, and the bytes that follow it."""
        tokens = [token for token in vocabulary if token]
        flat, starts, lengths = _flat(tokens)
        hashes = _prefix_hashes(flat, starts, lengths)
        # The value at a byte is the hash of all bytes before it in its token: a prefix, which is
        # empty at the first byte and carries no information there.
        is_inner = np.ones(len(flat), bool)
        is_inner[starts] = False
        order = np.argsort(hashes[is_inner], kind="stable")
        keys, following = hashes[is_inner][order], flat[is_inner][order]
        self._hashes, first = np.unique(keys, return_index=True)
        bits = np.zeros((len(keys), 4), np.uint64)
        bits[np.arange(len(keys)), following >> 6] = np.uint64(1) << (following & 63).astype("u8")
        self._bits = np.bitwise_or.reduceat(bits, first) if len(keys) else bits

    def masks(self, left: Sequence[bytes]) -> NDArray[np.uint64]:
        """[X, 4] set of 256 bytes for each left string: before these, a token may reach across."""
        masks = np.zeros((len(left), 4), np.uint64)
        flat, starts, lengths = _flat(left)
        if not len(flat) or not len(self._hashes):
            return masks
        hashes = _prefix_hashes(flat, starts, lengths)
        string_of_byte = np.repeat(np.arange(len(left)), lengths)
        ends = starts + lengths
        whole = hashes[ends[string_of_byte] - 1] * _BASE + flat[ends[string_of_byte] - 1] + 1
        num_rest = ends[string_of_byte] - np.arange(len(flat))
        suffixes = whole - hashes * _powers(int(lengths.max()))[num_rest]
        places = np.searchsorted(self._hashes, suffixes)
        places[places == len(self._hashes)] = 0
        found = np.flatnonzero(self._hashes[places] == suffixes)
        np.bitwise_or.at(masks, string_of_byte[found], self._bits[places[found]])
        return masks


def _flat(
    strings: Sequence[bytes],
) -> tuple[NDArray[np.uint64], NDArray[np.intp], NDArray[np.intp]]:
    """[L] bytes of all strings, [X] start of each, [X] their lengths."""
    lengths = np.array([len(string) for string in strings], np.intp)
    flat = np.frombuffer(b"".join(strings), np.uint8).astype(np.uint64)
    return flat, np.cumsum(lengths) - lengths, lengths


def _prefix_hashes(
    flat: NDArray[np.uint64], starts: NDArray[np.intp], lengths: NDArray[np.intp]
) -> NDArray[np.uint64]:
    """[L] polynomial hash, modulo 2^64, of the bytes before each byte in its string."""
    hashes = np.zeros(len(flat), np.uint64)
    active = np.flatnonzero(lengths > 1)
    position = 0
    while len(active):
        here = starts[active] + position
        hashes[here + 1] = hashes[here] * _BASE + flat[here] + np.uint64(1)
        position += 1
        active = active[lengths[active] > position + 1]
    return hashes


def _powers(highest: int) -> NDArray[np.uint64]:
    powers = np.ones(highest + 1, np.uint64)
    powers[1:] = _BASE
    return np.cumprod(powers, dtype=np.uint64)
