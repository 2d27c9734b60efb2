r"""Numbers as people write them, read exactly: `1,234`, `18 dollars`, `50%`, `\frac12`, `1,2`.

Values are fractions of integers; no float is involved.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

_MAX_CHARACTERS = 1000  # Python refuses to read an integer of more than 4,300 digits
_SPACES = " \u00a0\u2009\u202f"
_PLAIN = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_GROUPED = (
    r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?"
    r"|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]*)?"  # lakhs: 1,00,000
    rf"|[0-9]{{1,3}}(?:[{_SPACES}][0-9]{{3}})+(?:\.[0-9]*)?"
)
_FRACTION = rf"(?:(?P<whole>[0-9]+)[{_SPACES}]+)?(?P<over>[0-9]+)\s?/\s?(?P<under>[0-9]+)"
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}
_UNITS_OF_SIGNS = {**_CURRENCIES, "%": "percent", "°": "degree"}
_QUANTITY = re.compile(
    rf"(?P<sign>[-+])?\s?(?P<currency>[$€£])?\s?(?:(?P<fraction>{_FRACTION})"
    rf"|(?P<decimal>{_GROUPED}|{_PLAIN}))"
    r"\s?(?P<unit>[%€£°]|[A-Za-z]{2,}(?:(?:\s|/)[A-Za-z]{2,}){0,3}(?:\^?[23]|[²³])?)?"
)
_IN_A_SENTENCE = re.compile(rf"(?<![\w.,:/^-])-?[$€£]?(?:{_GROUPED}|{_PLAIN})(?:/[0-9]+)?%?")
# Words after a number that change its value, or are not units at all.
_NOT_UNITS = frozenset(
    [
        "pi",
        "tau",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "exp",
        "mod",
        "base",
        "or",
        "and",
        "to",
        "than",
        "times",
        "plus",
        "minus",
        "over",
        "by",
        "of",
        "divided",
        "squared",
        "cubed",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "am",
        "pm",
    ]
)
_LATEX = (
    ("\\left", ""), ("\\right", ""), ("\\!", ""), ("{,}", ","), ("\\,", "\u2009"), ("\\;", " "),
    ("\\ ", " "), ("~", " "), ("\\$", "$"), ("\\%", "%"), ("\\{", "{"), ("\\}", "}"),
    ("^{\\circ}", "°"), ("^\\circ", "°"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"), ("\u2212", "-"), ("\u2013", "-"),
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s?\{([^{}]*)\}")
_FRAC = re.compile(r"\\frac\s?(?:\{(-?[0-9]+)\}|([0-9]))\s?(?:\{([0-9]+)\}|([0-9]))")


@dataclass(frozen=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: str = ""  # without plural endings; empty where there is none
    is_decimal: bool = True  # written with digits and a point, not as a fraction

    def is_same(self, other: "Quantity") -> bool:
        """Whether the values are equal and the units do not contradict each other.

        A unit that one side omits does not count. Units are not converted, except percent: 50% is
        the same as 50 and as 0.5, since golds omit the sign in either sense.
        """
        units = {self.unit, other.unit}
        if self.value == other.value:
            return len(units) == 1 or "" in units
        if units != {"", "percent"}:
            return False
        percent, plain = (self, other) if self.unit else (other, self)
        return percent.value / 100 == plain.value


@dataclass(frozen=True)
class Readings:
    """Readings of a text as numbers; a text may have several, or none."""

    quantity: Quantity | None = None
    lists: frozenset[tuple[Fraction, ...]] = field(default_factory=frozenset)
    brackets: str = ""  # around a list

    @property
    def any(self) -> bool:
        """Whether it is a number or a list of numbers."""
        return self.quantity is not None or bool(self.lists)


def readings(text: str) -> Readings:
    """Read a whole text as a number with or without a unit, or as a list of numbers.

    `1,234` is a number and a list of two; `1,2` is only a list, because thousands have three
    digits; `(1,2)` is a list.
    """
    if len(text) > _MAX_CHARACTERS:
        return Readings()
    plain = _without_latex(text)
    brackets = plain[:1] + plain[-1:]
    if brackets in ("()", "[]", "{}"):
        return Readings(lists=_lists(plain[1:-1]), brackets=brackets)
    return Readings(quantity=_quantity(plain), lists=_lists(plain))


def last_quantity(sentence: str) -> Quantity | None:
    """The last number in a sentence; None without one, or where a word multiplies it."""
    numbers = list(_IN_A_SENTENCE.finditer(sentence[-_MAX_CHARACTERS:]))
    if not numbers:
        return None
    found = numbers[-1]
    behind = found.string[found.end() :]
    word = re.match(r"\s?([A-Za-z]+)", behind)
    if re.match(r"[\w:/^]", behind) or (word and word[1].lower() in _NOT_UNITS - {"and", "or"}):
        return None
    return _quantity(found[0])


def _without_latex(text: str) -> str:
    for written, meant in _LATEX:
        text = text.replace(written, meant)
    text = _TEXT.sub(r" \1 ", text)
    return " ".join(_FRAC.sub(r" \1\2/\3\4", text).split())


def _quantity(text: str) -> Quantity | None:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    unit = _unit(match["currency"] or "", match["unit"] or "")
    if unit is None:
        return None
    if match["fraction"]:
        if int(match["under"]) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    else:
        value = Fraction(re.sub(f"[,{_SPACES}]", "", match["decimal"]))
    return Quantity(-value if match["sign"] == "-" else value, unit, not match["fraction"])


def _unit(currency: str, unit: str) -> str | None:
    """One unit from the words before and after a number; None if they are not a unit."""
    words = re.split(r"[\s/]+", _UNITS_OF_SIGNS.get(unit, unit).lower())
    if _NOT_UNITS & set(words):
        return None
    named = " ".join(word.removesuffix("s") for word in words)
    before = _CURRENCIES.get(currency, "")
    if before and named and not named.startswith(before):
        named = f"{before} {named}"  # $5 per hour
    return named or before


def _lists(text: str) -> frozenset[tuple[Fraction, ...]]:
    """The ways to read a text as a list of two or more numbers."""
    found = set()
    for separator in (r",", r"[,;]\s+", r";"):
        items = [_quantity(item) for item in re.split(separator, text)]
        if len(items) > 1 and all(item is not None and not item.unit for item in items):
            found.add(tuple(item.value for item in items if item is not None))
    return frozenset(found)
