"""A row of the input as it stands in its file, before anything is made of it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row and where it stands."""

    file: str
    number: int  # from 1: a line, an element of an array, or a row of a table
    content: Any  # bytes of a line that is not parsed yet, or what it holds
