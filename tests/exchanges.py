"""A TraceExchange among threads of one process, for tests of streams with several ranks."""

from queue import Queue


class QueueExchange:
    def __init__(self, rank, queues):
        self._rank = rank
        self._queues = queues  # [from][to]

    def swap(self, parts):
        for other, part in enumerate(parts):
            self._queues[self._rank][other].put(part)
        found = [row[self._rank].get(timeout=30) for row in self._queues]
        if any(part is None for part in found):
            raise ConnectionError("another rank gave up")
        return found

    def give_up(self):
        for queue in self._queues[self._rank]:
            queue.put(None)


def queue_exchanges(num_ranks):
    """One exchange for each rank."""
    queues = [[Queue() for _ in range(num_ranks)] for _ in range(num_ranks)]
    return [QueueExchange(rank, queues) for rank in range(num_ranks)]
