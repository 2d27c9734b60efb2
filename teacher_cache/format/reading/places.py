"""Places of traces in the shards of a cache: (shard, row), found by id."""

from bisect import bisect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from teacher_cache.format.commit import ShardCommit

Place = tuple[int, int]  # index of the shard, row in it

_NUM_NEIGHBORS = 1000  # ids compared with a missing one, on either side of it


def each_trace_once(commits: Sequence[ShardCommit]) -> tuple[Place, ...]:
    """The place of every trace; for one in several shards, that in the first."""
    seen = set()
    once = []
    for shard_index, commit in enumerate(commits):
        for row, trace in enumerate(commit.traces):
            if trace.trace_id not in seen:
                seen.add(trace.trace_id)
                once.append((shard_index, row))
    return tuple(once)


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
