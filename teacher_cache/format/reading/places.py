"""Traces and shards of a cache as sequences, and places: (shard, row), found by id."""

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import overload

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.catalog import Catalog
from teacher_cache.format.commit import ShardCommit, TraceInfo

Place = tuple[int, int]  # index of the shard, row in it

_CHUNK_ROWS = 1 << 13  # of which facts are Python objects at a time

_NUM_NEIGHBORS = 1000  # ids compared with a missing one, on either side of it


class Places(Sequence[Place]):
    """Places of traces, in arrays."""

    def __init__(self, catalog: Catalog, catalog_rows: NDArray[np.int64]) -> None:
        """Take the traces in some rows of a catalogue.

        Args:
            catalog: Catalogue of the cache.
            catalog_rows: [n] rows of it.
        """
        self.catalog_rows = catalog_rows
        self.shard: NDArray[np.int64] = (
            np.searchsorted(catalog.first_row, catalog_rows, "right") - 1
        )
        self.row: NDArray[np.int64] = catalog_rows - catalog.first_row[self.shard]
        self._catalog = catalog

    def __len__(self) -> int:
        return len(self.catalog_rows)

    def __iter__(self) -> Iterator[Place]:
        return zip(self.shard.tolist(), self.row.tolist(), strict=True)

    @overload
    def __getitem__(self, number: int) -> Place: ...
    @overload
    def __getitem__(self, number: slice) -> "Places": ...
    def __getitem__(self, number: int | slice) -> "Place | Places":
        if isinstance(number, slice):
            return Places(self._catalog, self.catalog_rows[number])
        return int(self.shard[number]), int(self.row[number])


class Shards(Sequence[ShardCommit]):
    """Commit records of a cache, made from its catalogue when they are asked for."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __len__(self) -> int:
        return self._catalog.num_shards

    @overload
    def __getitem__(self, number: int) -> ShardCommit: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[ShardCommit, ...]: ...
    def __getitem__(self, number: int | slice) -> ShardCommit | tuple[ShardCommit, ...]:
        shards = range(len(self))[number]
        if isinstance(shards, range):
            return tuple(map(self._catalog.commit, shards))
        return self._catalog.commit(shards)


class Infos(Sequence[TraceInfo]):
    """Facts about traces, made from the catalogue when they are asked for."""

    def __init__(self, catalog: Catalog, index: NDArray[np.int64]) -> None:
        self._catalog = catalog
        self._index = index  # rows of the catalogue, ascending

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[TraceInfo]:
        for first in range(0, len(self._index), _CHUNK_ROWS):
            index = self._index[first : first + _CHUNK_ROWS]
            yield from self._catalog.infos(index)

    @overload
    def __getitem__(self, number: int) -> TraceInfo: ...
    @overload
    def __getitem__(self, number: slice) -> "Infos": ...
    def __getitem__(self, number: int | slice) -> "TraceInfo | Infos":
        if isinstance(number, slice):
            return Infos(self._catalog, self._index[number])
        (info,) = self._catalog.infos(self._index[[number]])
        return info


def rows_by_shard(places: Iterable[Place]) -> dict[int, list[int]]:
    """Shard -> rows of the places in it, both in order of appearance."""
    rows: dict[int, list[int]] = {}
    for shard, row in places:
        rows.setdefault(shard, []).append(row)
    return rows


def alike_ids(trace_id: str, ids: Iterable[str]) -> str:
    """End of a message: ids that may be meant, from those nearby in sorted order."""
    ordered = sorted(ids)
    position = bisect(ordered, trace_id)
    near = ordered[max(0, position - _NUM_NEIGHBORS) : position + _NUM_NEIGHBORS]
    if matches := get_close_matches(trace_id, near):
        return f". Did you mean {' or '.join(map(repr, matches))}?"
    return f". Its ids look like {', '.join(map(repr, ordered[:3]))}." if ordered else ""
