"""What the commands' options share: lists of names, and defaults from a TOML file."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def split_names(
    ctx: click.Context, param: click.Parameter, value: str | list[str]
) -> tuple[str, ...]:
    """Split `a,b`; a TOML list comes as it is. Which names there are, the configuration says."""
    names = value.split(",") if isinstance(value, str) else value
    return tuple(name.strip() for name in names)


def split_numbers(
    ctx: click.Context, param: click.Parameter, value: str | list[float] | None
) -> tuple[float, ...] | None:
    """Split `3,1`; a TOML list comes as it is. Empty text is no number."""
    if value is None:
        return None
    numbers = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(number) for number in numbers if str(number).strip())
    except (TypeError, ValueError) as error:
        raise click.BadParameter(
            f"expected numbers with commas, got {value!r}", ctx, param
        ) from error


def read_defaults(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take a command's defaults from a TOML file of its option names."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path}: not TOML: {error}", ctx, param) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {item.name for item in ctx.command.params} - {param.name, "json"}
    for item in ctx.command.params:  # what may be given several times need not be a list
        if item.name in values and item.multiple and isinstance(values[item.name], str):
            values[item.name] = [values[item.name]]
    unknown = sorted(set(values) - known)
    if unknown:
        raise click.BadParameter(
            f"{path}: no option {unknown[0]!r}; there are {', '.join(sorted(known))}", ctx, param
        )
    ctx.default_map = values
    return path


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=read_defaults,
        is_eager=True,
        expose_value=False,
        help="TOML file with defaults for these options, by their names.",
    )(command)
