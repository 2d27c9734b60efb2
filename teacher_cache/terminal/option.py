"""One truth for an option: what a configuration's field says of itself.

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        lead_span: float | None = option(
            "Proportion of every trace to train on, from its start.",
            default=None, group="Tokens", basic=True, above=0, at_most=1, unset="whole traces",
        )

        def __post_init__(self) -> None:
            check_options(self)

Name, type and default are the field's own. The command line, configuration files, the checks of
values, the groups of --help and the option reference are made from it. Nothing here loads click.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of an option beside its field's name, type and default.

    Attributes:
        help: A sentence that says what it sets, and when to touch it.
        group: Heading under which --help shows it.
        basic: Whether it stands among the first options of --help.
        choices: The values that it takes; all where there are none named. Of a tuple, its items'.
        at_least: Smallest number.
        above: The number must be larger.
        at_most: Largest number.
        below: The number must be smaller.
        unset: What happens where it is None, for --help.
        metavar: What --help calls its value.
        changeable: Whether a run may be continued with another value.
        is_argument: Whether it stands without a name on the command line.
        is_repeatable: Whether a tuple is given by repeating the option, not with commas.
        has_unit_letters: Whether a number may be written 32B, 600M, 100k.
    """

    help: str
    group: str = "Other"
    basic: bool = False
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unset: str | None = None
    metavar: str | None = None
    changeable: bool = False
    is_argument: bool = False
    is_repeatable: bool = False
    has_unit_letters: bool = False

    @property
    def has_range(self) -> bool:
        """Whether it is a number with bounds."""
        return any(b is not None for b in (self.at_least, self.above, self.at_most, self.below))

    @property
    def range_text(self) -> str:
        """Its bounds in words; empty without any."""
        low = f"at least {self.at_least:g}" if self.at_least is not None else ""
        low = f"above {self.above:g}" if self.above is not None else low
        high = f"at most {self.at_most:g}" if self.at_most is not None else ""
        high = f"below {self.below:g}" if self.below is not None else high
        return " and ".join(text for text in (low, high) if text)

    def holds(self, number: float) -> bool:
        """Whether a number is inside the bounds; NaN never is."""
        return not (
            math.isnan(number)
            or (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )


def option(
    help_text: str,
    *,
    default: Any = MISSING,  # noqa: ANN401  # a field's default is of the field's type
    default_factory: Callable[[], Any] | None = None,
    **known: Any,  # noqa: ANN401  # the attributes of Option, which checks their names
) -> Any:  # noqa: ANN401  # stands where a value of the field's type is expected
    """Make a dataclass field that is an option; `known` are attributes of `Option`."""
    metadata = {_KEY: Option(help=help_text, **known)}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(item: "dataclasses.Field[Any]") -> Option:
    """The option that a field is.

    Raises:
        TypeError: If the field was made without `option`.
    """
    found = item.metadata.get(_KEY)
    if not isinstance(found, Option):
        raise TypeError(f"{item.name}: expected a field made by option(), found a plain one")
    return found


def options_of(config: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a configuration by name, in their order."""
    return {item.name: item for item in dataclasses.fields(config)}


def changeable_names(config: type) -> frozenset[str]:
    """Fields that may have another value when a run is continued."""
    fields = options_of(config)
    return frozenset(name for name, item in fields.items() if option_of(item).changeable)


def flag_of(name: str) -> str:
    """A field's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def check_options(config: object) -> None:
    """Check every field's value against its own choices and bounds.

    Raises:
        ValueError: Naming the option, what was expected and what was found.
    """
    for item in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass by contract
        value, known = getattr(config, item.name), option_of(item)
        if value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            _check_value(flag_of(item.name), known, one)


def _check_value(flag: str, known: Option, value: object) -> None:
    if known.choices and isinstance(value, str) and value not in known.choices:
        listed = ", ".join(name or "''" for name in known.choices)
        raise ValueError(
            f"{flag}: expected one of {listed}, got {value!r}{near(value, known.choices)}"
        )
    if known.has_range and isinstance(value, int | float) and not known.holds(value):
        raise ValueError(f"{flag}: expected a number {known.range_text}, got {value}")


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` where one of the names is close to a misspelt one, else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def read_values(config: type, values: dict[str, Any], reserved: Sequence[str] = ()) -> None:
    """Check the names in a configuration file's content.

    Args:
        config: Whose options they should be.
        values: By name, with dashes or underscores already made underscores.
        reserved: Names that the caller sets itself.

    Raises:
        ValueError: Naming the first that is unknown or reserved.
    """
    known = options_of(config)
    for name in values:
        if name in reserved:
            raise ValueError(f"{name}: it is set for every run and must not stand here")
        if name not in known:
            listed = ", ".join(sorted(set(known) - set(reserved)))
            raise ValueError(f"no option {name!r}{near(name, known)}; there are {listed}")
