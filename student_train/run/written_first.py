"""What is being written, and finished before a process that lost another one is ended."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_begun: list[object] = []


@contextmanager
def written_first() -> Iterator[None]:
    """Finish what is written inside the block although another process is lost meanwhile."""
    written = object()
    with _lock:
        _begun.append(written)
    try:
        yield
    finally:
        with _lock:
            _begun.remove(written)


def is_writing() -> bool:
    """Whether some thread of this process is inside such a block."""
    with _lock:
        return bool(_begun)
