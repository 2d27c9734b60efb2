"""A slice of a trace as a sequence of its own (arXiv 2512.21002, the ablation of parts)."""

from dataclasses import dataclass, replace
from typing import Self

from teacher_cache.format import lead_span_length
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.trace import SourceTrace

PARTS = ("lead", "middle", "last")
FIELD = "slice"  # among a trace's own fields: the slice's token range in its trace


@dataclass(frozen=True)
class TraceSlice:
    """Which part of every trace is scored, without the tokens before it as context."""

    part: str  # one of PARTS
    proportion: float  # in (0, 1]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `middle:0.5`.

        Raises:
            ValueError: If the text is not a slice.
        """
        part, colon, number = text.partition(":")
        try:
            proportion = float(number)
        except ValueError:
            proportion = 0.0
        if part not in PARTS or not colon or not 0.0 < proportion <= 1.0:
            raise ValueError(
                f"slice: expected {', '.join(PARTS)} with a proportion in (0, 1], as in "
                f"middle:0.5, got {text!r}"
            )
        return cls(part, proportion)

    def cut(self, trace: SourceTrace) -> SourceTrace:
        """The slice of a trace, with its bounds shifted and the id unchanged.

        keep = max(1, floor(n * proportion)) tokens, as a lead span has; a middle slice begins at
        floor((n - keep) / 2). The field `slice` says which tokens of how many it holds.

        Raises:
            BadRow: If the trace already has a field of that name.
        """
        n_whole = len(trace.token_ids)
        keep = lead_span_length(n_whole, self.proportion)
        first = {"lead": 0, "middle": (n_whole - keep) // 2, "last": n_whole - keep}[self.part]

        def moved(position: int) -> int:
            return min(max(position - first, 0), keep)

        if FIELD in trace.fields:
            raise BadRow(Reason.FIELD_RESERVED, f"the row has a field {FIELD!r} of its own")
        cut = {
            "part": self.part,
            "proportion": self.proportion,
            "first_token": first,
            "n_whole": n_whole,
        }
        return replace(
            trace,
            token_ids=trace.token_ids[first : first + keep],
            num_prompt=moved(trace.num_prompt),
            bounds=None
            if trace.bounds is None
            else (moved(trace.bounds[0]), moved(trace.bounds[1])),
            fields={**trace.fields, FIELD: cut},
            without_rows=tuple(
                (moved(start), moved(end))
                for start, end in trace.without_rows
                if moved(start) < moved(end)
            ),
        )
