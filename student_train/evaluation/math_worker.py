"""A process that compares mathematics, within limits that the kernel enforces.

    python -P math_worker.py CPU_SECONDS ADDRESS_BYTES

Prints {"version": ...} once it is ready. Then, for each line [found, gold] of stdin, both as
math-verify parses them, a line on stdout: "same", "different", or "error" where math-verify cannot
compare them. Exceeding a limit ends the process; its parent sees the end of stdout.
"""

import functools
import importlib.metadata
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO


def main() -> None:
    """Answer requests until stdin ends."""
    cpu_s, address_bytes = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write among the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who started this
    import math_verify  # noqa: F401  # before the limits hold: loading is no part of a comparison

    logging.disable(logging.CRITICAL)  # it reports every odd answer
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _reply(replies, {"version": importlib.metadata.version("math-verify")})
    for line in sys.stdin:
        found, gold = json.loads(line)
        # Its own timers would need this one; the default action of SIGPROF ends the process, in
        # the middle of C code too, and also when its parent is gone.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        outcome = _compare(found, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, outcome)


def _compare(found: str, gold: str) -> str:
    from math_verify import verify

    try:
        given, wanted = _parse(found), _parse(gold)
        same = bool(given and wanted) and verify(
            list(wanted), list(given), timeout_seconds=None, raise_on_error=True
        )
    except MemoryError:
        os._exit(1)
    # sympy and the LaTeX grammar raise errors of every kind on text that is not mathematics.
    except Exception:
        return "error"
    return "same" if same else "different"


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> tuple[Any, ...]:
    """Parse as LaTeX alone: numbers found in other text would make 12:30 equal to 12."""
    from math_verify import LatexExtractionConfig, parse

    return tuple(parse(text, [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True))


def _reply(replies: TextIO, value: object) -> None:
    replies.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
