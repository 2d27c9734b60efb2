"""SourceTrace: a row of the input, rendered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from teacher_cache.format import content_hash
from teacher_cache.sources.marks import ThinkMarks

TokenRanges = tuple[tuple[int, int], ...]  # of tokens: (first, end)


@dataclass(frozen=True)
class SourceTrace:
    """One row of the input, rendered: a prompt, or a whole trace."""

    trace_id: str
    token_ids: tuple[int, ...]
    num_prompt: int  # tokens of the prompt; all tokens if traces are generated
    bounds: tuple[int, int] | None  # (cot_start, answer_start) of a given trace
    fields: Mapping[str, Any]  # the user's own, which travel with the trace
    finish_reason: str | None = None  # "length" for a given trace that was cut off
    without_rows: TokenRanges = ()  # tokens of the prompt that get no distributions
    opened_at: int | None = None  # token at which a prompt opens a chain of thought
    messages: Mapping[str, Any] | None = None  # the prompt's messages; None if it was text
    marks: ThinkMarks | None = None  # the teacher's, for a generated trace
    student_logprobs: tuple[float, ...] | None = None  # of a rollout's tokens after its prompt

    @property
    def source_hash(self) -> str:
        """Hash of the trace's input, which reveals a changed input under the same id."""
        parts: list[object] = [self.token_ids, self.bounds]
        if self.student_logprobs is not None:
            parts.append(self.student_logprobs)
        return content_hash([*parts, self.without_rows] if self.without_rows else parts)


Render = Callable[[dict[str, Any]], SourceTrace]
