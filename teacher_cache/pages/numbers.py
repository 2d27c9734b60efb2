"""Numbers for people: three digits and a prefix."""

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def quantity(value: float, unit: str) -> str:
    """Three digits with a prefix: `120 MB`, `103 GFLOP`."""
    prefix = 0
    while abs(value) >= 999.5 and prefix < len(_PREFIXES) - 1:
        value, prefix = value / 1000, prefix + 1
    digits = 0 if value >= 99.95 or prefix == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_PREFIXES[prefix]}{unit}"


def byte_count(value: float) -> str:
    """`4.45 MB`."""
    return quantity(value, "B")


def percent(share: float) -> str:
    """`50 %`, `37.5 %`; never `-0 %`."""
    return f"{round(100 * share, 1) + 0.0:g} %"
