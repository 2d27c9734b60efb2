"""Values of options as text: TOML files, and words of a command line. No click here."""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from teacher_cache.terminal.option import (
    Option,
    check_value,
    flag_of,
    is_mapping,
    item_kind,
    kinds_of,
    near,
    option_of,
    options_of,
)

_UNIT_LETTERS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_NAMES = {str: "text", Path: "a path as text", int: "a whole number", float: "a number"}


def read_config_file(path: Path, config: type, *, reserved: Collection[str] = ()) -> dict[str, Any]:
    """Read a TOML file of a configuration's options.

    Args:
        path: The file; its names may have dashes or underscores.
        config: Configuration whose options these are.
        reserved: Options that the file must not set because the caller does.

    Returns:
        Values by field name, converted to the fields' types.

    Raises:
        ValueError: If it cannot be read, is not TOML, or an option is unknown, reserved,
            set twice or invalid. Names the file and the option.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a TOML file: {error}") from error
    fields = options_of(config)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in reserved:
            raise ValueError(f"{path}: {key}: not allowed here, it is set elsewhere")
        if name not in fields:
            listed = ", ".join(sorted(set(fields) - set(reserved)))
            raise ValueError(f"{path}: no option {key!r}{near(name, fields)}; there are {listed}")
        if name in values:
            raise ValueError(f"{path}: {key}: set twice, with dashes and with underscores")
        try:
            values[name] = _of_toml(option_of(fields[name]), kinds_of(config)[name], value)
            check_value(config, fields[name], values[name])
        except ValueError as error:
            said = str(error).removeprefix(f"{flag_of(fields[name])}: ")
            raise ValueError(f"{path}: {key}: {said}") from error
    return values


def fields_of_json(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert JSON or TOML values of a configuration's options to its fields' types.

    Raises:
        ValueError: If a value is not of its field's type.
    """
    fields, kinds = options_of(config), kinds_of(config)
    return {
        name: None if value is None else _of_toml(option_of(fields[name]), kinds[name], value)
        for name, value in values.items()
    }


def _of_toml(known: Option, kind: Any, value: Any) -> Any:  # noqa: ANN401  # TOML's, a field's
    item = item_kind(kind)
    if item is not None:
        if isinstance(value, str) and not known.is_repeatable:
            return split_list(value, item)
        values = value if isinstance(value, list) else [value]
        return tuple(_of_toml(known, item, one) for one in values)
    if known.parse is not None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"expected a number or text, got {value!r}")
        return known.parse(str(value))
    if is_mapping(kind):
        if not isinstance(value, dict):
            raise ValueError(f"expected a table of names and values, got {value!r}")
        return {name.replace("-", "_"): one for name, one in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if known.has_unit_letters and isinstance(value, str):
        return parse_count(value)
    of_toml = {int: (int,), float: (int, float)}.get(kind, (str,))
    if isinstance(value, bool) or not isinstance(value, of_toml):  # a bool is an int in Python
        raise ValueError(f"expected {_NAMES[kind]}, got {value!r}")
    return kind(value)


def parse_count(text: str) -> float:
    """Parse a large number: 32e9, 32B, 600M, 100k.

    Raises:
        ValueError: If it is not a number.
    """
    factor = _UNIT_LETTERS.get(text[-1:], 1.0)
    try:
        return float(text if factor == 1.0 else text[:-1]) * factor
    except ValueError as error:
        raise ValueError(f"expected a number such as 32B or 1.5e9, got {text!r}") from error


def split_list(text: str, item: Any) -> tuple[Any, ...]:  # noqa: ANN401  # type of the items
    """Split text at its commas; names in a set are joined by plus signs (`prompt+cot,cot`).

    Raises:
        ValueError: If an item has the wrong type.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if item is str:
        return tuple(parts)
    if item_kind(item) is str:
        return tuple(tuple(name.strip() for name in part.split("+")) for part in parts)
    try:
        return tuple(item(part) for part in parts)
    except ValueError as error:
        kind = "whole numbers" if item is int else "numbers"
        raise ValueError(f"expected {kind} with commas between them, got {text!r}") from error


def as_words(config: type, values: Mapping[str, Any]) -> list[str]:
    """Write option values as command-line words that parse to the same values.

    Args:
        config: Configuration whose options these are.
        values: Values by field name; None is left out.
    """
    words: list[str] = []
    for name, value in values.items():
        words += _words(options_of(config)[name], kinds_of(config)[name], value)
    return words


def _words(item: "Field[Any]", kind: object, value: Any) -> list[str]:  # noqa: ANN401  # a field's
    flag = flag_of(item)
    if value is None:
        return []
    if option_of(item).is_argument:
        return [str(value)]
    if value is True:
        return [flag]
    if value is False:
        return [] if item.default is False else [f"--no-{flag[2:]}"]
    if is_mapping(kind):
        return [word for name, one in value.items() for word in (flag, f"{name}={json.dumps(one)}")]
    if option_of(item).is_repeatable:
        return [word for one in value for word in (flag, str(one))]
    if isinstance(value, tuple):
        value = list_text(value)
    return [flag, str(value)]


def list_text(values: tuple[Any, ...]) -> str:
    """A tuple as the command line expects it: commas, and plus signs inside sets of names."""
    return ",".join("+".join(v) if isinstance(v, tuple) else f"{v}" for v in values)
