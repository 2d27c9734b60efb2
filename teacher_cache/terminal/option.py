"""Options: the single definition of each, as metadata of a configuration's field.

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        lead_span: float | None = option(
            "Proportion of every trace to train on, from its start.",
            default=None, group="Data", basic=True, above=0, at_most=1, unset="whole traces",
        )

        def __post_init__(self) -> None:
            check_options(self)

Name, type and default are the field's own. The command line (commands.py), configuration files
(config_file.py), the checks of values, the groups of --help and the option reference are made from
it. Nothing here loads click.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """Facts about an option besides its field's name, type and default.

    Attributes:
        help: Sentence that says what it sets, and when to touch it.
        group: Heading under which --help shows it.
        basic: Whether it is among the first options of --help.
        choices: Allowed values; empty allows any. For a tuple, those of its items.
        at_least: Smallest number; bounds of a tuple are those of its items.
        above: Number that it must exceed.
        at_most: Largest number.
        below: Number that it must stay below.
        unset: Text in --help instead of the default, for example the effect of None.
        metavar: Name of its value in --help.
        letter: Short form, such as `o` for `-o`.
        changeable: Whether a run may be resumed with another value.
        is_argument: Whether it is positional on the command line.
        is_repeatable: Whether a tuple is given by repeating the option, without commas.
        can_be_empty: Whether a tuple without items, or an empty text, is a value.
        has_unit_letters: Whether a number may be written 32B, 600M, 100k.
        parse: Parses its text, or one item of a repeatable tuple, if its type is not one of
            the usual ones; raises ValueError.
    """

    help: str
    group: str = "Options"
    basic: bool = False
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unset: str | None = None
    metavar: str | None = None
    letter: str | None = None
    changeable: bool = False
    is_argument: bool = False
    is_repeatable: bool = False
    can_be_empty: bool = False
    has_unit_letters: bool = False
    parse: Callable[[str], object] | None = None

    @property
    def range_text(self) -> str:
        """The bounds in words; empty without any."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        low = f"at least {self.at_least:g}" if self.at_least is not None else ""
        low = f"above {self.above:g}" if self.above is not None else low
        high = f"at most {self.at_most:g}" if self.at_most is not None else ""
        high = f"below {self.below:g}" if self.below is not None else high
        return " and ".join(text for text in (low, high) if text)

    def holds(self, number: float) -> bool:
        """Whether a number is finite and inside the bounds."""
        return math.isfinite(number) and not (
            (self.at_least is not None and number < self.at_least)
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


def same_option(
    config: type,
    name: str,
    *,
    default: Any = MISSING,  # noqa: ANN401  # of the field's type
    **changed: Any,  # noqa: ANN401  # attributes of Option
) -> Any:  # noqa: ANN401  # stands where a value of the field's type is expected
    """Make a field from another configuration's option `name`, with attributes `changed`."""
    item = options_of(config)[name]
    metadata = {_KEY: dataclasses.replace(option_of(item), **changed)}
    if item.default_factory is not MISSING and default is MISSING:
        return field(default_factory=item.default_factory, metadata=metadata)
    return field(default=item.default if default is MISSING else default, metadata=metadata)


def option_of(item: "dataclasses.Field[Any]") -> Option:
    """The option of a field.

    Raises:
        TypeError: If the field was made without `option`.
    """
    found = item.metadata.get(_KEY)
    if not isinstance(found, Option):
        raise TypeError(f"{item.name}: expected a field made by option(), found a plain one")
    return found


def options_of(config: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a configuration by name, in order."""
    return {item.name: item for item in dataclasses.fields(config)}


@functools.cache
def kinds_of(config: type) -> Mapping[str, Any]:
    """Types of a configuration's fields by name, without None; a path or URI counts as text."""
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(config).items()}


def _without_none(hint: object) -> Any:  # noqa: ANN401  # a type, of any kind
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        left = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return left[0] if len(left) == 1 else str
    return hint


def is_mapping(kind: object) -> bool:
    """Whether a field of this type is given as name=value."""
    return typing.get_origin(kind) is Mapping


def item_kind(kind: object) -> Any:  # noqa: ANN401  # a type, of any kind
    """Type of a tuple's items, or None for other types; a path or URI counts as text."""
    return _without_none(typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else None


def changeable_names(config: type) -> frozenset[str]:
    """Fields whose values may change when a run is resumed."""
    fields = options_of(config)
    return frozenset(name for name, item in fields.items() if option_of(item).changeable)


def flag_of(item: "dataclasses.Field[Any]") -> str:
    """A field as the command line spells it: `--lead-span`, or `CACHE` for an argument."""
    if option_of(item).is_argument:
        return item.name.upper()
    return f"--{item.name.replace('_', '-')}"


def check_options(config: object) -> None:
    """Check every field's value against its own choices and bounds.

    Raises:
        ValueError: Names the option, what was expected and what was found.
    """
    for item in options_of(type(config)).values():
        check_value(type(config), item, getattr(config, item.name))


def check_value(config: type, item: "dataclasses.Field[Any]", value: object) -> None:
    """Check one field's value; None always passes.

    Raises:
        ValueError: Names the option, what was expected and what was found.
    """
    known, flag = option_of(item), flag_of(item)
    if value is None:
        return
    if item_kind(kinds_of(config)[item.name]) is None:
        _check_one(flag, known, value)
        return
    if not isinstance(value, tuple):
        raise ValueError(f"{flag}: expected a tuple, got {value!r}")
    if not value and not known.can_be_empty:
        raise ValueError(f"{flag}: expected at least one value, got none")
    for one in value:
        for each in one if isinstance(one, tuple) else (one,):
            _check_one(flag, known, each)


def _check_one(flag: str, known: Option, value: object) -> None:
    if isinstance(value, str):
        if known.choices and value not in known.choices:
            listed = ", ".join(known.choices)
            raise ValueError(
                f"{flag}: expected one of {listed}, got {value!r}{near(value, known.choices)}"
            )
        if not value and not known.can_be_empty:
            raise ValueError(f"{flag}: expected a value, got an empty text")
    elif isinstance(value, int | float) and not known.holds(value):
        expected = f"a number {known.range_text}" if known.range_text else "a finite number"
        raise ValueError(f"{flag}: expected {expected}, got {value}")


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` if one of the names is close to a misspelt one, else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
