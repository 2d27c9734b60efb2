"""Kinds of values and the configuration file that cache-teacher's commands share."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path)


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


def named(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, object], ...]
) -> dict[str, object]:
    """Values of a repeatable NamedValue option, as a dictionary."""
    del ctx, param
    return dict(pairs)


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Values of a TOML file become the defaults of the command's options."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {option.name for option in ctx.command.params}
    if unknown := sorted(set(values) - known):
        raise click.BadParameter(f"{path}: no option {unknown[0]!r}", ctx, param)
    for name in ("engine_arg", "template_arg"):
        if isinstance(values.get(name), Mapping):
            values[name] = list(values[name].items())
    ctx.default_map = {**(ctx.default_map or {}), **values}
