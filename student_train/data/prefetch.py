"""A bounded prefetch thread."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

CLOSE_S = 10.0  # far more than reading a shard takes

_T = TypeVar("_T")


class Prefetch(Iterator[_T]):
    """Runs an iterator in one thread, at most `depth` items ahead; a `with` block closes it."""

    def __init__(self, source: Iterator[_T], depth: int, *, is_shared: bool) -> None:
        """Start the thread.

        Args:
            source: Iterator that only the thread uses.
            depth: Largest number of items that are read ahead.
            is_shared: Whether other processes' threads wait for this one's items: then closing
                early lets it read as far ahead as theirs do, if their consumers stop here too.
        """
        self.wait_s = 0.0  # that the consumer has waited so far
        self._is_shared = is_shared
        self._source = source
        self._depth = depth
        self._items: deque[_T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        # A daemon, so that a consumer that dies without closing cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name="trace-stream", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._source:
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
                    if self._closed and not (self._is_shared and len(self._items) < self._depth):
                        return
        except BaseException as error:  # every error is the consumer's: it is raised there
            self._error = error
        finally:
            self._source = iter(())  # what the source holds, on the disk too, goes with it
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __next__(self) -> _T:
        """The next item; raises here what the thread raised there."""
        started_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            self.wait_s += time.perf_counter() - started_s
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, dropping what it had read ahead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # An unresponsive store is retried for minutes; closing does not wait for that.
        self._thread.join(CLOSE_S)
