"""A rank's part of the held-out traces: read by whole shards, shared by tokens."""

from dataclasses import replace

import numpy as np

from student_train.data.dealing import deal
from student_train.data.exchange import TraceExchange, handed_over
from student_train.data.traces import TrainingData
from teacher_cache.format import CacheError, Trace


def heldout_part(
    data: TrainingData,
    *,
    rank: int,
    num_ranks: int,
    exchange: TraceExchange | None,
    limit: int,
) -> list[Trace]:
    """Read the first held-out traces, as `TrainingData.heldout_traces` does, and share them.

    Args:
        data: Data with held-out traces.
        rank: Rank whose part is returned.
        num_ranks: Number of ranks that share the traces; all call this together.
        exchange: Transport of traces among them; see `TraceStream`.
        limit: Largest number of traces, over all ranks.

    Raises:
        CacheFormatError: If a shard is missing or damaged.
        ConnectionError: If a shard lies elsewhere and cannot be reached, or another rank gave up.
    """
    places = [(n, *place) for n, source in enumerate(data.sources) for place in source.heldout]
    places, infos = places[:limit], data.heldout_infos()[:limit]
    _, shard = np.unique([place[:2] for place in places], axis=0, return_inverse=True)
    lengths = np.array([info.n_total for info in infos], np.int64)
    dealing = deal(
        shard, lengths, batch_traces=limit, num_ranks=num_ranks, can_exchange=exchange is not None
    )
    read: dict[int, Trace] = {}
    try:
        for number, source in enumerate(data.sources):
            cache = replace(source.cache, bytes_read=0)  # with a count of its own
            mine = [i for i in dealing.reads(rank).tolist() if places[i][0] == number]
            index_of_id = {infos[index].trace_id: index for index in mine}
            for trace in cache.read_held(places[index][1:] for index in mine):
                read[index_of_id[trace.trace_id]] = trace
    except (CacheError, OSError):
        if exchange is not None:
            exchange.give_up()  # or the others would wait for these traces
        raise
    found = handed_over(
        read, infos, reader=dealing.reader.tolist(), trainer=dealing.trainer.tolist(),
        rank=rank, num_ranks=num_ranks, exchange=exchange,
    )  # fmt: skip
    return list(found.values())
