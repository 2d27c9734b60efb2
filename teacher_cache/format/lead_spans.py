"""A mixture of lead spans: several lengths, and the share of the data that gets each."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class LeadSpans:
    """Lengths with weights, written `0.375:4,1:1`; every trace gets one of them.

    Here four of five traces are cut at 0.375 and the fifth is whole. `draw_spans` draws each
    trace's length from the run's seed.

    Attributes:
        lengths: Proportions of a trace, or numbers of tokens; ascending.
        weights: Weight of each length; only their ratios count.

    Raises:
        ValueError: If there is no length, one occurs twice, or a weight is not positive.
    """

    lengths: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.weights):
            raise ValueError(
                f"lead spans: expected a weight for every length, got {len(self.lengths)} lengths "
                f"and {len(self.weights)} weights"
            )
        for first, second in pairwise(self.lengths):
            if not first < second:
                raise ValueError(
                    f"lead spans: expected every length once, ascending; got {_text(first)} before "
                    f"{_text(second)}"
                )
        for weight in self.weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"lead spans: expected positive weights, got {weight}")

    @classmethod
    def parse(cls, text: str) -> "LeadSpans":
        """Read `0.375:4,1:1`; a missing weight is 1, and the order does not matter.

        Raises:
            ValueError: If the text cannot be read; it says why.
        """
        pairs = []
        for item in text.split(","):
            length, _, weight = item.partition(":")
            try:
                pairs.append((float(length), float(weight or 1)))
            except ValueError:
                raise ValueError(
                    f"expected a number, or lengths with weights such as 0.375:4,1:1; got {text!r}"
                ) from None
        lengths, weights = zip(*sorted(pairs), strict=True)
        return cls(lengths, weights)

    def __str__(self) -> str:
        pairs = zip(self.lengths, self.weights, strict=True)
        return ",".join(f"{_text(length)}:{_text(weight)}" for length, weight in pairs)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights as shares that sum to one."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    @property
    def mean(self) -> float:
        """Mean length."""
        return math.fsum(n * share for n, share in zip(self.lengths, self.shares, strict=True))

    def index_at(self, quantile: float) -> int:
        """Index of the length at a quantile in [0, 1) of the shares laid end to end."""
        ends = list(accumulate(self.shares))
        return min(bisect_right(ends, quantile), len(ends) - 1)


def parse_span(text: str) -> float | LeadSpans:
    """Read a proportion of a trace, or several with weights.

    Raises:
        ValueError: If it is neither.
    """
    spans = LeadSpans.parse(text)
    return spans.lengths[0] if len(spans.lengths) == 1 else spans


def parse_tokens(text: str) -> int | LeadSpans:
    """Read a number of tokens, or several with weights.

    Raises:
        ValueError: If it is neither.
    """
    budgets = LeadSpans.parse(text)
    if len(budgets.lengths) > 1:
        return budgets
    if not budgets.lengths[0].is_integer():
        raise ValueError(f"expected a whole number of tokens, got {text!r}")
    return int(budgets.lengths[0])


def in_json(length: object) -> object:
    """A length as a JSON value: the number, or the mixture in its written form."""
    return str(length) if isinstance(length, LeadSpans) else length


def _text(number: float) -> str:
    """The number with every digit, but without `.0`."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))
