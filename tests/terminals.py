"""A terminal of a program's own, and what its screen shows."""

import os
import pty
import select
import termios
import time

import pyte

ROWS = 24
LIMIT_S = 60


class Terminal:
    """A program on a terminal: `start(streams, environment)` gives its process.

    The program's input and errors are the terminal's; its output is a pipe, as in a shell's `$()`,
    by which it says when it is where the test wants it.
    """

    def __init__(self, columns, start):
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (ROWS, columns))
        self._out, out = os.pipe()
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}
        self.process = start((theirs, out, theirs), environment)
        os.close(theirs)
        os.close(out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._out)

    def read_until(self, is_done):
        """Feed the screen until a condition holds; the rows that were shown on the way."""
        seen = set()
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            is_last = is_done()
            # A display is written 4 times a second: where nothing comes for a while, it is whole.
            while select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self._stream.feed(os.read(self._ours, 65536))
                except OSError:  # the other end is closed
                    return seen
                seen.update(self.rows())
            if is_last:
                return seen
            assert time.monotonic() < deadline_s, self.rows()

    def read_to_the_end(self):
        return self.read_until(lambda: False)

    def has_said_here(self):
        return bool(select.select([self._out], [], [], 0)[0])

    def press_ctrl_c(self):
        os.write(self._ours, b"\x03")

    def rows(self):
        return [row.rstrip() for row in self.screen.display if row.strip()]
