"""Handing of traces from the rank that reads them to the rank that trains on them.

A trace travels as its arrays, 9 bytes a token (4 more for each of the columns that only some caches
have) and 8 a kept entry; everything else about it every rank knows from the commit records. Letters
as in `Trace`: m tokens, E entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import OPTIONAL_COLUMNS, Trace, TraceInfo

_Bytes = NDArray[np.uint8]


class TraceExchange(Protocol):
    """Transport among ranks; all call it equally often, in the same order, from one thread each."""

    def swap(self, parts: Sequence[_Bytes]) -> list[_Bytes]:
        """Send each rank its part; return the parts that the ranks sent here, this one included.

        Raises:
            ConnectionError: If another rank gave up or is gone.
        """
        ...

    def give_up(self) -> None:
        """Answer the others' next `swap` with the news that this rank cannot go on."""
        ...


def handed_over(
    read: Mapping[int, Trace],
    infos: Sequence[TraceInfo],
    *,
    reader: Sequence[int],
    trainer: Sequence[int],
    rank: int,
    num_ranks: int,
    exchange: TraceExchange | None,
) -> dict[int, Trace]:
    """Traces that a rank trains on, out of a batch that all ranks have read together.

    Args:
        read: Traces that this rank has read, by their index in the batch.
        infos: Commit records of all the batch's traces.
        reader: Rank that reads each.
        trainer: Rank that trains on each.
        rank: This rank.
        num_ranks: Number of ranks.
        exchange: Transport; None where each rank has read what it trains on.

    Returns:
        Index in the batch -> trace, in the batch's order.

    Raises:
        ConnectionError: If another rank gave up or is gone.
    """
    if exchange is None:
        return dict(sorted(read.items()))
    wanted_by = [[i for i in sorted(read) if trainer[i] == other] for other in range(num_ranks)]
    mine, wanted_by[rank] = wanted_by[rank], []  # these need not travel
    received = exchange.swap([packed([read[i] for i in indices]) for indices in wanted_by])
    found = {index: read[index] for index in mine}
    for other, data in enumerate(received):
        if other == rank:
            continue
        indices = [i for i in range(len(infos)) if reader[i] == other and trainer[i] == rank]
        traces = unpacked(data, [infos[index] for index in indices])
        found.update(zip(indices, traces, strict=True))
    return dict(sorted(found.items()))


def packed(traces: Sequence[Trace]) -> _Bytes:
    """The arrays of traces, one after the other: all counts, all ids, all logits, ..."""
    if not traces:
        return np.zeros(0, np.uint8)
    none = np.zeros(0, np.float32)
    optional = [
        [none if getattr(trace, name) is None else getattr(trace, name) for trace in traces]
        for name in OPTIONAL_COLUMNS
    ]
    counts = np.array(
        [
            (len(trace), trace.num_entries, *(len(column[number]) for column in optional))
            for number, trace in enumerate(traces)
        ],
        np.int64,
    )
    columns = [
        counts.ravel(),
        *(trace.token_ids for trace in traces),
        *(trace.tail_logit for trace in traces),
        *(trace.top_ids for trace in traces),
        *(trace.top_logits for trace in traces),
        *(values for column in optional for values in column),
        *(trace.k for trace in traces),  # last: a byte each, so that all others are aligned
    ]
    return np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns])


def packed_bytes(trace: Trace) -> int:
    """Bytes that `packed` makes of one trace: about what its arrays take in memory."""
    optional = [getattr(trace, name) for name in OPTIONAL_COLUMNS]
    num_floats = sum(len(column) for column in optional if column is not None)
    counts = 8 * (2 + len(OPTIONAL_COLUMNS))
    return counts + 9 * len(trace) + 8 * trace.num_entries + 4 * num_floats


def unpacked(data: _Bytes, infos: Sequence[TraceInfo]) -> list[Trace]:
    """The traces of `packed`, which have these commit records."""
    if not infos:
        return []
    width = 2 + len(OPTIONAL_COLUMNS)
    end = 8 * width * len(infos)
    num_tokens, num_entries, *num_optional = data[:end].view(np.int64).reshape(-1, width).T
    kinds: list[tuple[NDArray[np.int64], np.dtype[Any]]] = [
        (num_tokens, np.dtype(np.int32)),
        (num_tokens, np.dtype(np.float32)),
        (num_entries, np.dtype(np.int32)),
        (num_entries, np.dtype(np.float32)),
        *((lengths, np.dtype(np.float32)) for lengths in num_optional),
        (num_tokens, np.dtype(np.uint8)),
    ]
    columns = []
    for lengths, dtype in kinds:
        begin, end = end, end + int(lengths.sum()) * dtype.itemsize
        columns.append(np.split(data[begin:end].view(dtype), np.cumsum(lengths)[:-1]))
    return [
        Trace(
            trace_id=info.trace_id, token_ids=token_ids, n_total=info.n_total,
            cot_start=info.cot_start, answer_start=info.answer_start,
            k=k, top_ids=top_ids, top_logits=top_logits, tail_logit=tail_logit,
            finish_reason=info.finish_reason, fields=info.fields,
            **{
                name: column
                for name, column in zip(OPTIONAL_COLUMNS, optional, strict=True)
                if len(column)
            },
        )
        for info, token_ids, tail_logit, top_ids, top_logits, *optional, k in zip(
            infos, *columns, strict=True
        )
    ]  # fmt: skip
