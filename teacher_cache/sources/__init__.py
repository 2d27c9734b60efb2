"""The user's prompts and traces: files of any kind -> token ids and section bounds."""

from teacher_cache.sources.columns import PROMPT_TURNS, Layout
from teacher_cache.sources.files import Input
from teacher_cache.sources.input_traces import Source, read_ids
from teacher_cache.sources.marks_in_tokens import find_first, find_last, find_sections
from teacher_cache.sources.rejects import BadRow, Reason, Rejects, SourceError
from teacher_cache.sources.render import PromptRenderer, TraceRenderer
from teacher_cache.sources.slices import Slice
from teacher_cache.sources.trace import Render, SourceTrace

__all__ = [
    "PROMPT_TURNS",
    "BadRow",
    "Input",
    "Layout",
    "PromptRenderer",
    "Reason",
    "Rejects",
    "Render",
    "Slice",
    "Source",
    "SourceError",
    "SourceTrace",
    "TraceRenderer",
    "find_first",
    "find_last",
    "find_sections",
    "read_ids",
]
