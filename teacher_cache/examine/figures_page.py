"""`cache-teacher inspect --html`: the figures of a cache as a page."""

from pathlib import Path

from teacher_cache.examine.inspection import Inspection
from teacher_cache.format import Cache
from teacher_cache.pages.charts import BarChart, bar_chart
from teacher_cache.pages.page import render
from teacher_cache.pages.sections import SECTION_NAMES
from teacher_cache.pages.traces import header_rows
from teacher_cache.terminal.escape import printable

_TEMPLATE = Path(__file__).with_name("figures.html")


def figures_page(cache: Cache, figures: Inspection) -> bytes:
    """Make the page."""
    return render(
        _TEMPLATE,
        title=f"A cache of {printable(cache.header.teacher)}",
        path=printable(cache.path),
        figures=figures,
        charts=entry_charts(figures),
        lengths=[
            bar_chart(f"{SECTION_NAMES[name]}, tokens", counts)
            for name, counts in figures.section_lengths.items()
        ],
        header=header_rows(cache),
    )


def entry_charts(figures: Inspection) -> list[BarChart]:
    """Charts of the measured entries, with their means as titles."""
    found = figures.measured
    whose = "" if found.tail_histogram is not None else " of the kept entries alone"
    charts = [
        bar_chart(f"entropy{whose}, nats (mean {found.mean_entropy:.2f})", found.entropy_histogram),
        bar_chart(f"kept entries (mean {found.mean_k:.1f})", found.k_histogram),
    ]
    if found.tail_histogram is not None:
        title = f"tail mass (mean {found.tail_mass_mean:.1e})"
        charts.append(bar_chart(title, found.tail_histogram))
    return charts
