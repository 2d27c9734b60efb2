"""Handles Ctrl-C before the proper signal handling is imported.

Imports almost nothing: only Python's own start precedes it.
"""

import os
import sys
from signal import SIGINT, SIGTERM, signal


def stop_at_once(name: str) -> None:
    """End the program at the first signal, in one line; `stop_signals` takes over later."""

    def leave(signum: int, frame: object) -> None:
        what = "Ctrl-C" if signum == SIGINT else "SIGTERM"
        os.write(sys.stderr.fileno(), f"{name}: stopped by {what}\n".encode())
        os._exit(128 + signum)

    for number in (SIGINT, SIGTERM):
        signal(number, leave)
