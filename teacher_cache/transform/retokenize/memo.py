"""Memo: a numpy hash table of integers, of fixed size, for many keys at once."""

import numpy as np
from numpy.typing import NDArray

_EMPTY = np.int64(-1)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Memo:
    """Maps keys (at least 0) to some int32 values each. Entries that do not fit are dropped."""

    def __init__(self, num_values: int, *, log2_slots: int = 21) -> None:
        """Make an empty table; it takes 8 + 4 * num_values bytes per slot, half of them in use."""
        self._shift = np.uint64(64 - log2_slots)
        self._wrap = (1 << log2_slots) - 1
        self._keys = np.full(1 << log2_slots, _EMPTY)
        self._values = np.zeros((1 << log2_slots, num_values), np.int32)
        self.num_keys = 0

    def find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """[N, num_values] values of the keys, and [N] which of them are known."""
        slots = self._home(keys)
        found = self._keys[slots]
        known = found == keys
        pending = np.flatnonzero(~known & (found != _EMPTY))
        while len(pending):
            slots[pending] = (slots[pending] + 1) & self._wrap
            found = self._keys[slots[pending]]
            hit = found == keys[pending]
            known[pending[hit]] = True
            pending = pending[~hit & (found != _EMPTY)]
        return self._values[slots], known

    def insert(self, keys: NDArray[np.int64], values: NDArray[np.int32]) -> None:
        """Add missing keys [N], each once, with values [N, num_values]."""
        if self.num_keys + len(keys) > len(self._keys) // 2:
            self._keys.fill(_EMPTY)
            self.num_keys = 0
            keys, values = keys[: len(self._keys) // 2], values[: len(self._keys) // 2]
        self.num_keys += len(keys)
        slots = self._home(keys)
        pending = np.arange(len(keys))
        while len(pending):
            here = slots[pending]
            is_free = self._keys[here] == _EMPTY
            self._keys[here[is_free]] = keys[pending[is_free]]  # of two for one slot, one is kept
            placed = self._keys[here] == keys[pending]
            self._values[here[placed]] = values[pending[placed]]
            pending = pending[~placed]
            slots[pending] = (slots[pending] + 1) & self._wrap

    def _home(self, keys: NDArray[np.int64]) -> NDArray[np.intp]:
        return ((keys.view(np.uint64) * _MULTIPLIER) >> self._shift).astype(np.intp)
