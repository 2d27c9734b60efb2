"""The cells of a sweep: the runs that answer the question, with their options. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from student_train.data.tokens import TokenSelection
from student_train.run.config import TrainConfig
from teacher_cache.format.lead_spans import LeadSpans

FULL = "span-1"  # what retention is measured against


@dataclass(frozen=True)
class Cell:
    """One run and its evaluation, or the untrained student's evaluation."""

    group: str  # cells that differ in the seed alone are one group
    kind: str  # "span", "mixture" or a baseline
    seed: int | None  # None for the untrained student
    options: Mapping[str, Any] | None  # of the run; None without one

    @classmethod
    def of(cls, kind: str, seed: int, options: Mapping[str, Any]) -> "Cell":
        """A trained cell, named by its differences from the run's defaults."""
        defaults = {item.name: item.default for item in fields(TrainConfig)}
        own = {name: value for name, value in options.items() if value != defaults[name]}
        selection = {
            item.name: own[item.name] for item in fields(TokenSelection) if item.name in own
        }
        TokenSelection(**selection)  # refuses what cannot be
        is_named = kind in ("span", "mixture")
        return cls(_group_name(own) if is_named else kind, kind, seed, own)

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return self.group if self.seed is None else f"{self.group}_seed-{self.seed}"

    @property
    def selection(self) -> TokenSelection:
        """Selection of the tokens that it trains on."""
        options = self.options or {}
        return TokenSelection(
            **{
                item.name: options[item.name]
                for item in fields(TokenSelection)
                if item.name in options
            }
        )


def _group_name(options: Mapping[str, Any]) -> str:
    span = options.get("lead_span", 1.0)
    if "trace_tokens" in options:
        parts = [f"tokens-{options['trace_tokens']}"]
    elif isinstance(span, LeadSpans):  # a folder's name: no colons or commas
        parts = [f"mix-{span}".replace(":", "x").replace(",", "+")]
    else:
        parts = [f"span-{span:g}"]
    if "loss_on" in options:
        parts.append(options["loss_on"])
    if "sections" in options:
        parts.append("+".join(options["sections"]))
    if "lead_span_of" in options:
        parts.append(f"of-{options['lead_span_of']}")
    if "loss_dropout" in options:
        parts.append(f"mask-{options['loss_dropout']:g}")
    return "_".join(parts)
