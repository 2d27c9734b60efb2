"""profile.html: where along a trace the student has something to learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from student_train.profile.advice import Advice
from teacher_cache.pages.charts import BarChart, LineChart, Series, bar_chart, line_chart
from teacher_cache.pages.numbers import percent
from teacher_cache.pages.page import render
from teacher_cache.pages.sections import SECTION_NAMES
from teacher_cache.terminal.escape import printable

_TEMPLATE = Path(__file__).with_name("profile.html")
_DIVERGENCE, _ENTROPY = "student's divergence", "teacher's entropy"


def profile_page(tables: Mapping[str, Any], advice: Advice) -> bytes:
    """Make the page of profile.json's tables."""
    return render(
        _TEMPLATE,
        title=f"What {printable(Path(tables['student']).name)} has to learn, and where",
        student=printable(tables["student"]),
        divergence=tables["divergence"],
        num_traces=tables["num_traces"],
        advice=advice.sentence,
        curves=[_by_position(tables["positions"]), _before_span(tables["divergence_before"])],
        sections=_by_section(tables["sections"]),
        spans=[
            [
                percent(row["lead_span"]),
                f"{percent(row['divergence_share'])} ({percent(row['divergence_share_low'])} to "
                f"{percent(row['divergence_share_high'])})",
                percent(row["teacher_entropy_share"]),
            ]
            for row in tables["divergence_before"]
        ],
        caches=[_cache_row(row) for row in tables["caches"]],
    )


def _by_position(rows: Sequence[Mapping[str, Any]]) -> LineChart:
    middle = [(row["begin"] + row["end"]) / 2 for row in rows]
    deciles = np.array([row["divergence_deciles"] for row in rows])
    least, most = deciles[:, 0].tolist(), deciles[:, -1].tolist()
    return line_chart(
        "Mean per token (band: the middle eight tenths of the tokens' divergence)",
        "place in the trace", "nats per token",
        [
            Series(_DIVERGENCE, middle, [row["divergence"] for row in rows], least, most),
            Series(_ENTROPY, middle, [row["teacher_entropy"] for row in rows]),
        ],
        x_form=percent,
    )  # fmt: skip


def _before_span(rows: Sequence[Mapping[str, Any]]) -> LineChart:
    spans = [0.0, *(row["lead_span"] for row in rows)]
    column = {
        name: [0.0, *(row[name] for row in rows)]
        for name in (
            "divergence_share", "divergence_share_low", "divergence_share_high",
            "teacher_entropy_share",
        )
    }  # fmt: skip
    return line_chart(
        "Share of the whole that lies before a lead span (band: 95 % interval)",
        "lead span", "share before it",
        [
            Series(
                _DIVERGENCE, spans, column["divergence_share"], column["divergence_share_low"],
                column["divergence_share_high"],
            ),
            Series(_ENTROPY, spans, column["teacher_entropy_share"]),
            Series("tokens", [0.0, 1.0], [0.0, 1.0]),
        ],
        x_form=percent, y_form=percent,
    )  # fmt: skip


def _by_section(rows: Sequence[Mapping[str, Any]]) -> list[BarChart]:
    num_tokens = sum(row["num_tokens"] for row in rows)
    names = [SECTION_NAMES[row["section"]] for row in rows]
    tokens = {n: row["num_tokens"] / num_tokens for n, row in zip(names, rows, strict=True)}
    divergence = {n: row["divergence_share"] for n, row in zip(names, rows, strict=True)}
    return [
        bar_chart("Share of the divergence by section", divergence, form="{:.1%}"),
        bar_chart("Share of the tokens by section", tokens, form="{:.1%}"),
    ]


def _cache_row(row: Mapping[str, Any]) -> list[str]:
    ratio = row["rank_surprisal_ratio"]
    interval = ""
    if ratio is not None:
        low, high = row["rank_surprisal_ratio_low"], row["rank_surprisal_ratio_high"]
        interval = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
    return [
        printable(row["cache"]), printable(row["teacher"]), interval or "-",
        f"{row['student_divergence']:.4f}", f"{row['num_traces']:,}", f"{row['num_tokens']:,}",
    ]  # fmt: skip
