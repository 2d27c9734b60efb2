"""The user's prompts and traces: from files of any kind to token ids and section bounds."""

from teacher_cache.sources.columns import (
    ASSISTANT_TURNS,
    PROMPT_LIKE_COLUMNS,
    PROMPT_TURNS,
    RowColumns,
    responses_of,
)
from teacher_cache.sources.files import Input
from teacher_cache.sources.input_traces import InputTraces, read_ids, row_values
from teacher_cache.sources.marks_in_tokens import (
    find_first,
    find_last,
    find_sections,
    opening_token,
)
from teacher_cache.sources.rejects import BadRow, Reason, Rejects, SourceError
from teacher_cache.sources.render import (
    PromptRenderer,
    TraceRenderer,
    given_id,
    own_fields,
)
from teacher_cache.sources.slices import TraceSlice
from teacher_cache.sources.trace import Render, SourceTrace

__all__ = [
    "ASSISTANT_TURNS",
    "PROMPT_LIKE_COLUMNS",
    "PROMPT_TURNS",
    "BadRow",
    "Input",
    "InputTraces",
    "PromptRenderer",
    "Reason",
    "Rejects",
    "Render",
    "RowColumns",
    "SourceError",
    "SourceTrace",
    "TraceRenderer",
    "TraceSlice",
    "find_first",
    "find_last",
    "find_sections",
    "given_id",
    "opening_token",
    "own_fields",
    "read_ids",
    "responses_of",
    "row_values",
]
