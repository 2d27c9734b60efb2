"""Commands made from configurations: the only module outside the cli folders that imports click.

`config_command` turns a dataclass whose fields are options (see option.py) into a click command:
one option per field, help in groups, defaults from --config, and every value that a configuration
refuses as a usage error (exit code 2).
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click

from teacher_cache.terminal.config_file import list_text, parse_count, read_config_file, split_list
from teacher_cache.terminal.option import (
    Option,
    flag_of,
    is_mapping,
    item_kind,
    kinds_of,
    option_of,
    options_of,
)

BASIC_GROUP = "Basic options"
LAST_GROUP = "Options"  # for options without a group, and for --config, --json and --help

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


class NamedValue(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """`name=value`, the value parsed as JSON if possible, else text."""

    name = "name=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        """Split at the first equals sign; a pair from a file is unchanged."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"expected name=value, got {value!r}", param, ctx)
        try:
            return name.strip().replace("-", "_"), json.loads(text)
        except ValueError:
            return name.strip().replace("-", "_"), text


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Text parsed by a function that may raise ValueError; values from a file are unchanged."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Parse the text."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ConfigCommand(click.Command):
    """A command made from a configuration; --help shows basic options first, then each group."""

    def __init__(self, *args: Any, config: type, **kwargs: Any) -> None:  # noqa: ANN401  # click's
        super().__init__(*args, **kwargs)
        self.config = config

    def group_of(self, param: click.Parameter) -> str:
        """Heading under which an option is listed."""
        item = options_of(self.config).get(param.name or "")
        return LAST_GROUP if item is None else option_of(item).group

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options under each heading; required ones come first."""
        fields = options_of(self.config)
        own_groups = (option_of(item).group for item in fields.values())
        headings = dict.fromkeys(["Arguments", BASIC_GROUP, *own_groups])
        headings.pop(LAST_GROUP, None)
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in [*headings, LAST_GROUP]}
        for param in sorted(self.get_params(ctx), key=lambda param: not param.required):
            item = fields.get(param.name or "")
            record = param.get_help_record(ctx)
            if item is not None and option_of(item).is_argument:
                rows["Arguments"].append((flag_of(item), option_of(item).help))
            elif record is not None:
                is_basic = item is not None and option_of(item).basic
                rows[BASIC_GROUP if is_basic else self.group_of(param)].append(record)
        for heading, records in rows.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=28)


def config_command(
    name: str,
    config: type,
    **context: Any,  # noqa: ANN401  # click's own
) -> Callable[[Callable[..., None]], ConfigCommand]:
    """Make a command from a function that takes a configuration.

    The function may have further click options of its own (`json_option`), passed by name
    after the configuration.
    """

    def decorate(function: Callable[..., None]) -> ConfigCommand:
        fields, kinds = options_of(config), kinds_of(config)

        def run(**values: Any) -> None:  # noqa: ANN401  # of every option
            own = {key: values.pop(key) for key in list(values) if key in fields}
            try:
                made = config(**{key: _as_field(kinds[key], value) for key, value in own.items()})
            except ValueError as error:
                raise click.UsageError(str(error), click.get_current_context()) from error
            function(made, **values)

        own_params = list(reversed(getattr(function, "__click_params__", [])))
        params = [_parameter(item, kinds[key]) for key, item in fields.items()]
        return ConfigCommand(
            name,
            callback=run,
            params=[*params, *own_params, _config_option(config)],
            help=function.__doc__,
            config=config,
            **context,
        )

    return decorate


def _as_field(kind: object, value: Any) -> Any:  # noqa: ANN401  # click's value, the field's
    """Convert click's value of a repeated option to the field's type."""
    return dict(value) if is_mapping(kind) else value


def _parameter(item: "Field[Any]", kind: object) -> click.Parameter:
    known = option_of(item)
    has_default = item.default is not MISSING
    required = not has_default and item.default_factory is MISSING
    if known.is_argument:
        nargs = -1 if known.is_repeatable else 1
        type_ = _click_type(known, kind)
        return click.Argument([item.name], type=type_, required=required, nargs=nargs)
    flag = flag_of(item)
    if kind is bool and item.default is False:
        return click.Option([flag, item.name], is_flag=True, default=False, help=_help(item, kind))
    # An explicit default of None would count as a value of a required option.
    default: dict[str, Any] = {"default": item.default} if has_default else {}
    letters = [] if known.letter is None else [f"-{known.letter}"]
    return click.Option(
        [*letters, f"{flag}/--no-{flag[2:]}" if kind is bool else flag, item.name],
        type=_click_type(known, kind),
        required=required,
        multiple=is_mapping(kind) or known.is_repeatable,
        metavar=known.metavar,
        help=_help(item, kind),
        **default,
    )


def _click_type(known: Option, kind: Any) -> click.ParamType:  # type: ignore[type-arg]  # noqa: ANN401
    item = item_kind(kind)
    if known.parse is not None:
        return Parsed("text", known.parse)
    if is_mapping(kind):
        return NamedValue()
    if item is not None and not known.is_repeatable:
        return Parsed("a,b,...", lambda text: split_list(text, item))
    if item is Path:
        kind = item
    if known.has_unit_letters:
        return Parsed("count", parse_count)
    if known.choices:
        return click.Choice(known.choices)
    if kind is Path:
        return click.Path(path_type=Path)
    if kind is int:
        return click.INT
    if kind is float:
        return click.FLOAT
    return click.BOOL if kind is bool else click.STRING


def notes_of(item: "Field[Any]", kind: object) -> list[str]:
    """The choices or bounds of an option, in words."""
    known = option_of(item)
    notes = []
    if item_kind(kind) is not None and known.choices:
        notes.append(f"of {', '.join(known.choices)}")
    if known.range_text:
        notes.append(known.range_text)
    return notes


def default_text(item: "Field[Any]") -> str:
    """Default of an option, in words; empty if there is none."""
    default, unset = item.default, option_of(item).unset
    if unset is not None:
        return unset
    if default is None or default is False or default is MISSING:
        return ""
    if isinstance(default, tuple):
        return list_text(default)
    return (
        "on" if default is True else f"{default:g}" if isinstance(default, float) else f"{default}"
    )


def _help(item: "Field[Any]", kind: object) -> str:
    notes = notes_of(item, kind)
    if default := default_text(item):
        notes.append(f"default: {default}")
    return option_of(item).help + (f"  [{'; '.join(notes)}]" if notes else "")


def _config_option(config: type) -> click.Option:
    def read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        try:
            values = read_config_file(path, config)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        kinds = kinds_of(config)
        for name, value in values.items():
            if is_mapping(kinds[name]):
                values[name] = list(value.items())  # as click represents repeated options
        ctx.default_map = {**(ctx.default_map or {}), **values}

    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="TOML file of these options by name; options on the command line win.",
    )
