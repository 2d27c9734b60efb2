"""The common output of every bench with `--json FILE`: a flat JSON object of its figures.

    {"fast_over_bare": 0.83, "host_us_per_token/compaction": 1.9, "rows/0.5/step_s": 0.98, ...}

Nested names are joined with slashes; a row of a table is keyed by its `name`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEPARATOR = "/"


def write_figures(file: Path | None, result: Mapping[str, Any]) -> None:
    """Write a bench's result to a file, if one was given; in place of what it wrote before."""
    if file is not None:
        temporary = file.with_name(file.name + ".new")  # a bench may be killed at any moment
        temporary.write_text(json.dumps(dict(flat(result)), indent=1, default=float) + "\n")
        temporary.replace(file)


def flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure under its full name."""
    for name, value in result.items():
        whole = prefix + str(name).replace(SEPARATOR, "-")
        if isinstance(value, list):
            value = dict(_named(row, number) for number, row in enumerate(value))
        if isinstance(value, Mapping):
            yield from flat(value, whole + SEPARATOR)
        else:
            yield whole, value


def _named(row: Any, number: int) -> tuple[str, Any]:  # noqa: ANN401 (any JSON)
    if isinstance(row, Mapping) and "name" in row:
        return str(row["name"]), {key: value for key, value in row.items() if key != "name"}
    return str(number), row


def nested(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`, with every table as a mapping from its rows' names."""
    tree: dict[str, Any] = {}
    for whole, value in figures.items():
        *path, last = whole.split(SEPARATOR)
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return tree
