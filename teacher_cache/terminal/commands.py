"""Commands made from configurations: the only module outside the cli folders that imports click.

`config_command` turns a dataclass whose fields are options (see option.py) into a click command:
one option a field, help in groups, defaults from --config, and every value that a configuration
refuses as an error of usage (exit code 2).
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from teacher_cache.terminal.option import Option, flag_of, near, option_of, options_of

_UNIT_LETTERS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BASIC_GROUP = "Basic options"


class NamedValue(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """`name=value`, the value JSON where it reads as such and text otherwise."""

    name = "name=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        """Split at the first equals sign."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"expected name=value, got {value!r}", param, ctx)
        try:
            return name.strip().replace("-", "_"), json.loads(text)
        except ValueError:
            return name.strip().replace("-", "_"), text


class Count(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A large number: 32e9, 32B, 600M, 100k."""

    name = "count"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the letter at the end as a factor."""
        text = str(value)
        factor = _UNIT_LETTERS.get(text[-1:], 1.0)
        try:
            return float(text if factor == 1.0 else text[:-1]) * factor
        except ValueError:
            self.fail(f"expected a number such as 32B or 1.5e9, got {text!r}", param, ctx)


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Values with commas between them; a list of a TOML file comes as it is.

    Sets of names (`prompt+cot,cot`) have plus signs inside.
    """

    def __init__(self, item: type | types.GenericAlias, name: str) -> None:
        self.item = item
        self.name = name

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[object, ...]:
        """Split at the commas; nothing is an empty list."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        return tuple(
            self._one(part, param, ctx)
            for part in parts
            if not isinstance(part, str) or part.strip()
        )

    def _one(
        self, part: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if typing.get_origin(self.item) is tuple:
            names = part.split("+") if isinstance(part, str) else part
            return tuple(str(name).strip() for name in names)  # type: ignore[attr-defined]
        if self.item is str:
            return str(part).strip()
        try:
            number = float(str(part))
            if self.item is int and number != int(number):
                raise ValueError
        except ValueError:
            kind = "whole numbers" if self.item is int else "numbers"
            self.fail(f"expected {kind} with commas between them, got {part!r}", param, ctx)
        return int(number) if self.item is int else number


class ConfigCommand(click.Command):
    """A command whose --help shows basic options first, then the others by group."""

    def __init__(self, *args: Any, groups: Mapping[str, str], **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.groups = groups  # of every option, by parameter name

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options under the heading of each group."""
        rows: dict[str, list[tuple[str, str]]] = {BASIC_GROUP: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                rows.setdefault(self.groups.get(param.name or "", "Other"), []).append(record)
        for group in sorted(rows, key=lambda name: name == "Other"):
            if rows[group]:
                with formatter.section(group):
                    formatter.write_dl(rows[group], col_max=28)


def config_command(
    name: str,
    config: type,
    **context: Any,  # noqa: ANN401  # click's own
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function that takes a configuration.

    The function may have further click options of its own (`--json`), which reach it by name
    behind the configuration.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        fields = options_of(config)
        hints = typing.get_type_hints(config)

        def run(**values: Any) -> None:  # noqa: ANN401  # of every option
            own = {key: values.pop(key) for key in list(values) if key in fields}
            try:
                made = config(**{key: _as_field(hints[key], value) for key, value in own.items()})
            except ValueError as error:
                raise click.UsageError(str(error), click.get_current_context()) from error
            function(made, **values)

        run.__doc__ = function.__doc__
        own_params = list(reversed(getattr(function, "__click_params__", [])))
        params = [_parameter(item, hints[key]) for key, item in fields.items()]
        groups = {
            key: BASIC_GROUP if option_of(item).basic else option_of(item).group
            for key, item in fields.items()
        }
        return ConfigCommand(
            name,
            callback=run,
            params=[*params, *own_params, _config_option(config)],
            help=function.__doc__,
            groups=groups,
            **context,
        )

    return decorate


def _as_field(hint: object, value: object) -> object:
    """What click gives for repeated options, as the field takes it."""
    kind = _without_none(hint)
    if typing.get_origin(kind) in (Mapping, dict):
        return dict(value)  # type: ignore[call-overload]
    if isinstance(value, list):
        return tuple(value)
    return value


def _without_none(hint: object) -> Any:  # noqa: ANN401  # a type, of any kind
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        left = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        # A place is a path or a URI: the command line has text for both.
        return left[0] if len(left) == 1 else str
    return hint


def _parameter(item: "dataclasses.Field[Any]", hint: object) -> click.Parameter:
    known = option_of(item)
    kind = _without_none(hint)
    has_default = item.default is not dataclasses.MISSING
    required = not has_default and item.default_factory is dataclasses.MISSING
    if known.is_argument:
        return click.Argument(
            [item.name], type=_click_type(known, kind), required=required, metavar=known.metavar
        )
    default = item.default if has_default else None
    flags = [flag_of(item.name)]
    shown: dict[str, Any] = {"help": _help(known, default), "show_default": False}
    if kind is bool:
        if default is not False:
            flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
            return click.Option([*flags, item.name], default=default, **shown)
        return click.Option([*flags, item.name], is_flag=True, default=False, **shown)
    is_mapping = typing.get_origin(kind) in (Mapping, dict)
    return click.Option(
        [*flags, item.name],
        type=NamedValue() if is_mapping else _click_type(known, kind),
        required=required,
        default=None if is_mapping else default,
        multiple=is_mapping or known.is_repeatable,
        metavar=known.metavar,
        **shown,
    )


def _click_type(known: Option, kind: Any) -> click.ParamType:  # type: ignore[type-arg]  # noqa: ANN401
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return click.STRING if known.is_repeatable else Listed(item, known.metavar or "a,b,...")
    if known.choices and kind is str:
        return click.Choice(known.choices)
    if known.has_unit_letters:
        return Count()
    if kind is int:
        return click.INT
    if kind is float:
        return click.FLOAT
    if kind is Path:
        return click.Path(path_type=Path)
    return click.STRING


def _help(known: Option, default: object) -> str:
    notes = []
    if known.range_text:
        notes.append(known.range_text)
    if isinstance(default, tuple):
        default = ",".join("+".join(v) if isinstance(v, tuple) else f"{v}" for v in default)
    if default is not None and default is not False and default != "":
        shown = {True: "on"}.get(default, default) if isinstance(default, bool) else default
        notes.append(f"default: {shown}")
    elif known.unset:
        notes.append(f"default: {known.unset}")
    return known.help + (f"  [{'; '.join(notes)}]" if notes else "")


def _config_option(config: type) -> click.Option:
    def read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        try:
            values = read_config_file(path)
            for name in values:
                known = {p.name for p in ctx.command.params if p.name not in ("config", "help")}
                if name not in known:
                    listed = ", ".join(sorted(n for n in known if n))
                    raise ValueError(
                        f"{path}: no option {name!r}{near(name, sorted(options_of(config)))}; "
                        f"there are {listed}"
                    )
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        for item in ctx.command.params:
            value = values.get(item.name or "")
            if isinstance(item.type, NamedValue) and isinstance(value, Mapping):
                values[item.name or ""] = list(value.items())
            elif getattr(item, "multiple", False) and isinstance(value, str):
                values[item.name or ""] = [value]  # what may be repeated need not be a list
        ctx.default_map = {**(ctx.default_map or {}), **values}

    return click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="TOML file with defaults for these options, by their names.",
    )


def read_config_file(path: Path) -> dict[str, Any]:
    """The values of a TOML file, by field name.

    Raises:
        ValueError: If it cannot be read or is not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a TOML file: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}
