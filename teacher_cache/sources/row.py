"""A row of the input as it is in its file, before parsing."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row and its position."""

    file: str
    number: int  # from 1: a line, an element of an array, or a row of a table
    content: Any  # bytes of a line not yet parsed, or parsed values
