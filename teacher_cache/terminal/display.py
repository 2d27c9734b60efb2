"""Progress on a terminal: what is being done with a bar in one row, its figures in the next.

Neither row is ever longer than the terminal: parts that do not fit are left out from the end.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

SEPARATOR = " | "
_LEAST_BAR, _MOST_BAR = 8, 40  # columns
_REFRESHES_PER_S = 4


class Shown(Protocol):
    """What a display asks for at each refresh."""

    @property
    def doing(self) -> str:
        """What is being done."""
        ...

    @property
    def share(self) -> float | None:
        """Share that is done; None if the total is not known."""
        ...

    @property
    def counts(self) -> Sequence[str]:
        """Units done, time and rate, the most important first."""
        ...

    @property
    def figures(self) -> str:
        """Figures of the work, the most important first."""
        ...


def start_display(shown: Shown, console: Console) -> Live:
    """Show the two rows until the display is stopped; nothing of them stays."""
    live = Live(
        _Rows(shown), console=console, transient=True, refresh_per_second=_REFRESHES_PER_S,
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    live.start()
    return live


class _Rows:
    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._spinner = Spinner("dots", style="progress.spinner")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        width = options.max_width - 3  # room for the ^C that a terminal writes behind
        yield self._first_row(width)
        figures = fitting(self._shown.figures.split(SEPARATOR), width)
        if figures:
            yield Text(figures, style="dim", no_wrap=True)

    def _first_row(self, width: int) -> Table:
        share = self._shown.share
        room = width - 2  # beside the spinner
        counts = fitting(self._shown.counts, room - cell_len(self._shown.doing) - 1)
        if not counts:
            counts = fitting(self._shown.counts[:1], room // 2)
        counts_width = cell_len(counts) + 1 if counts else 0
        doing = fitting([self._shown.doing], room - counts_width)
        bar_width = min(_MOST_BAR, room - counts_width - cell_len(doing) - 1)
        row: list[RenderableType] = [self._spinner, Text(doing)]
        if share is not None and bar_width >= _LEAST_BAR:
            row.append(ProgressBar(total=1.0, completed=share, width=bar_width))
        if counts:
            row.append(Text(counts))
        grid = Table.grid(padding=(0, 1), pad_edge=False)
        for _ in row:
            grid.add_column(no_wrap=True)
        grid.add_row(*row)
        return grid


def fitting(parts: Sequence[str], width: int) -> str:
    """As many leading parts as fit; the first is cut if even that does not."""
    found = ""
    for number, part in enumerate(parts):
        longer = part if number == 0 else f"{found}{SEPARATOR}{part}"
        if cell_len(longer) > width:
            if number == 0 and width > 1:
                cut = Text(part)
                cut.truncate(width, overflow="ellipsis")
                return cut.plain
            break
        found = longer
    return found
