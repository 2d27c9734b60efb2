"""Workers: chunks of traces converted on all cores and returned in order."""

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from teacher_cache.format import CacheError, CacheHeader, FinishedTrace
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.convert import Converter, Rejected, Task
from teacher_cache.transform.retokenize.loading import make_converter


class Workers:
    """Converts chunks in other processes, or in this one on a single core."""

    def __init__(self, config: RetokenizeConfig, source: CacheHeader) -> None:
        """Start them; this process reads the tokenizers too, so that errors appear directly."""
        self._num = config.processes or len(os.sched_getaffinity(0))
        self._convert = make_converter(config, source)
        self._pool: ProcessPoolExecutor | None = None
        if self._num > 1:
            self._pool = ProcessPoolExecutor(
                self._num,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(config, source),
            )

    def __enter__(self) -> "Callable[[Iterator[list[Task]]], Iterator[FinishedTrace | Rejected]]":
        return self._converted

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _converted(self, chunks: Iterator[list[Task]]) -> Iterator[FinishedTrace | Rejected]:
        if self._pool is None:
            for tasks in chunks:
                yield from self._convert(tasks)
            return
        waiting: deque[Future[list[FinishedTrace | Rejected]]] = deque()
        try:
            ends: list[list[Task] | None] = [None] * (2 * self._num)
            for chunk in itertools.chain(chunks, ends):
                if chunk is not None:
                    waiting.append(self._pool.submit(_convert, chunk))
                if waiting and (chunk is None or len(waiting) >= 2 * self._num):
                    yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise CacheError(
                "a process that was converting traces has died, probably for lack of memory; "
                "finished traces are kept. Run again with fewer --processes"
            ) from error


_converter: Converter | None = None  # of this process


def _start_worker(config: RetokenizeConfig, source: CacheHeader) -> None:
    global _converter  # an initializer has no other way to pass something on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have their own processes
    _converter = make_converter(config, source)


def _convert(tasks: list[Task]) -> list[FinishedTrace | Rejected]:
    if _converter is None:
        raise RuntimeError("the process was not started by _start_worker")
    return _converter(tasks)
