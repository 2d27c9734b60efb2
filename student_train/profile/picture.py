"""profile.png: a picture of where along a trace the student has something to learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(
    positions: Sequence[Mapping[str, Any]],
    sections: Sequence[Mapping[str, Any]],
    divergence_before: Sequence[Mapping[str, Any]],
    file: Path,
) -> None:
    """Write the picture of the tables of `figures`."""
    with mpl.rc_context({"font.size": 9}):
        # Not pyplot, which keeps state and asks for a display.
        figure = Figure(figsize=(13.5, 4.2), layout="constrained")
        per_token, before, by_section = figure.subplots(1, 3)
        _draw_positions(per_token, positions)
        _draw_shares(before, divergence_before)
        _draw_sections(by_section, sections)
        temporary = file.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=130)
    temporary.replace(file)


def _draw_positions(axes: Axes, positions: Sequence[Mapping[str, Any]]) -> None:
    middle = [(row["begin"] + row["end"]) / 2 for row in positions]
    deciles = np.array([row["divergence_deciles"] for row in positions])
    for low, high, alpha in ((0, 8, 0.12), (1, 7, 0.12), (2, 6, 0.12), (3, 5, 0.12)):
        axes.fill_between(
            middle, deciles[:, low], deciles[:, high], color="tab:blue", alpha=alpha, linewidth=0
        )
    axes.plot(
        middle,
        [row["divergence"] for row in positions],
        color="tab:blue",
        label="student's divergence",
    )
    axes.plot(
        middle,
        [row["teacher_entropy"] for row in positions],
        color="tab:orange",
        label="teacher's entropy",
    )
    axes.set(
        xlabel="position in the trace", ylabel="nats per token", xlim=(0, 1), ylim=(0, None),
        title="Mean per token (shaded: deciles of the divergence)",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_shares(axes: Axes, divergence_before: Sequence[Mapping[str, Any]]) -> None:
    spans = [row["lead_span"] for row in divergence_before]
    low = [row["divergence_share_low"] for row in divergence_before]
    high = [row["divergence_share_high"] for row in divergence_before]
    axes.fill_between(spans, low, high, color="tab:blue", alpha=0.25, linewidth=0)
    axes.plot(
        spans,
        [row["divergence_share"] for row in divergence_before],
        color="tab:blue",
        label="student's divergence",
    )
    axes.plot(
        spans,
        [row["teacher_entropy_share"] for row in divergence_before],
        color="tab:orange",
        label="teacher's entropy",
    )
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="tokens")
    axes.set(
        xlabel="lead span", ylabel="share before it", xlim=(0, 1), ylim=(0, 1.02),
        title="What each lead span holds (band: 95 % interval)",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_sections(axes: Axes, sections: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(sections))
    num_tokens = sum(row["num_tokens"] for row in sections)
    axes.bar(
        places - 0.2, [row["num_tokens"] / num_tokens for row in sections], 0.4, color="0.7",
        label="of the tokens",
    )  # fmt: skip
    axes.bar(
        places + 0.2, [row["divergence_share"] for row in sections], 0.4, color="tab:blue",
        label="of the divergence",
    )  # fmt: skip
    axes.set_xticks(places, [row["section"] for row in sections])
    axes.set(ylabel="share", ylim=(0, 1), title="By section")
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
