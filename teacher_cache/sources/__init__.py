"""The user's prompts and traces: files of any kind -> token ids and section bounds."""

from teacher_cache.sources.files import Input
from teacher_cache.sources.rejects import BadRow, Reason, Rejects, SourceError
from teacher_cache.sources.render import PromptRenderer, Render, SourceTrace, TraceRenderer
from teacher_cache.sources.sections import find_first, find_last, find_sections
from teacher_cache.sources.shapes import Layout
from teacher_cache.sources.source import Source, read_ids

__all__ = [
    "BadRow",
    "Input",
    "Layout",
    "PromptRenderer",
    "Reason",
    "Rejects",
    "Render",
    "Source",
    "SourceError",
    "SourceTrace",
    "TraceRenderer",
    "find_first",
    "find_last",
    "find_sections",
    "read_ids",
]
