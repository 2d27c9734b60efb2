"""Rows that arrive step by step, put together by request.

Memory grows with the rows in flight, in pages of 64 rows, as the engine's own cache does: a request
may be of any length, and a step's rows of all requests are stored in one numpy call.
"""

import numpy as np
from numpy.typing import NDArray

_PAGE_ROWS = 64
_FIRST_PAGES = 64


class RowPages:
    """Rows of the requests in flight, each under its slot, serial number and position.

    A row that arrives again replaces the earlier one: what an engine computes twice (after a
    preemption) needs no special case.
    """

    def __init__(self, num_slots: int, num_positions: int, num_words: int) -> None:
        """Make room for `num_slots` requests of up to `num_positions` rows of `num_words`."""
        # Zeros belong to nobody: serial numbers start at 1.
        self._rows = np.zeros((_FIRST_PAGES * _PAGE_ROWS, num_words), np.int32)
        self._free_pages = list(range(_FIRST_PAGES))
        columns = -(-num_positions // _PAGE_ROWS)
        self._pages = np.full((num_slots, columns), -1, np.int32)
        self._serials = np.full(num_slots, -1, np.int32)

    def open(self, slot: int, serial: int) -> None:
        """Take rows of this request from now on."""
        self._serials[slot] = serial

    def add(self, rows: NDArray[np.int32]) -> None:
        """Store rows [n, words] that start with slot, serial and position; late ones are dropped.

        Late are those of a request that was given up.
        """
        is_open = self._serials[rows[:, 0]] == rows[:, 1]
        if not is_open.all():
            rows = rows[is_open]
        slots, positions = rows[:, 0], rows[:, 2]
        columns = positions // _PAGE_ROWS
        pages = self._pages[slots, columns]
        for which in np.flatnonzero(pages < 0):
            place = slots[which], columns[which]
            if self._pages[place] < 0:
                self._pages[place] = self._new_page()
            pages[which] = self._pages[place]
        self._rows[pages * _PAGE_ROWS + positions % _PAGE_ROWS] = rows

    def _new_page(self) -> int:
        if not self._free_pages:
            # In small steps: at gigabytes, twice as much may be more than there is.
            num_pages = len(self._rows) // _PAGE_ROWS
            num_new = max(_FIRST_PAGES, num_pages // 4)
            larger = np.zeros(((num_pages + num_new) * _PAGE_ROWS, self._rows.shape[1]), np.int32)
            larger[: len(self._rows)] = self._rows
            self._rows = larger
            self._free_pages.extend(range(num_pages, num_pages + num_new))
        return self._free_pages.pop()

    def rows(self, slot: int, num_rows: int) -> NDArray[np.int32] | None:
        """The rows of the first `num_rows` positions; None if one of them has not arrived."""
        if num_rows == 0:
            return self._rows[:0]
        pages = self._pages[slot, : -(-num_rows // _PAGE_ROWS)]
        if (pages < 0).any():
            return None
        last = self._rows[pages[-1] * _PAGE_ROWS + (num_rows - 1) % _PAGE_ROWS]
        if last[1] != self._serials[slot] or last[2] != num_rows - 1:
            return None  # it usually arrives one step after the others
        found = self._rows.reshape(-1, _PAGE_ROWS, self._rows.shape[1])[pages]
        found = found.reshape(-1, self._rows.shape[1])[:num_rows]
        is_there = (found[:, 1] == self._serials[slot]) & (found[:, 2] == np.arange(num_rows))
        return found if is_there.all() else None

    def close(self, slot: int) -> None:
        """Forget a request's rows."""
        pages = self._pages[slot]
        self._free_pages.extend(pages[pages >= 0].tolist())
        pages[:] = -1
        self._serials[slot] = -1
