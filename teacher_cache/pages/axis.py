"""Axes of the charts: from values to places, and the ticks between."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which an axis is logarithmic
Form = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    place: float
    text: str


def prefixed(value: float) -> str:
    """A tick's value in few characters: `250`, `4k`, `1.5G`."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{prefix}"
    return f"{value:.6g}"


@dataclass(frozen=True)
class Axis:
    """A range of values, and where in the chart its ends lie."""

    low: float
    high: float
    start: float  # place of `low`
    end: float
    is_log: bool = False
    form: Form = prefixed

    @classmethod
    def fitted(
        cls, values: Sequence[float], start: float, end: float, *, may_be_log: bool, form: Form
    ) -> "Axis":
        """The axis that these finite values need."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        is_log = may_be_log and low > 0 and high / low > _LOG_FROM
        if not is_log and low > 0 and low < high / 2:
            low = 0.0
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(low, high, start, end, is_log, form)

    def place(self, value: float) -> float:
        """Place of a value; that of the nearer end for values outside."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, num_steps: int = 4) -> tuple[Tick, ...]:
        """About `num_steps` round values and their places."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            values = [d * 10.0**power for power in range(first, last) for d in (1, 2, 5)]
        else:
            step = _step((self.high - self.low) / num_steps)
            first = math.ceil(self.low / step - 1e-9)
            values = [n * step for n in range(first, first + 12)]
        inside = [v for v in values if self.low - 1e-12 <= v <= self.high * (1 + 1e-9) + 1e-12]
        return tuple(Tick(self.place(value), self.form(value)) for value in inside)


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))
