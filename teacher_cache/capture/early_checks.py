"""Checks of a capture before a tokenizer is loaded: failing takes a second, not a minute."""

from dataclasses import replace

from teacher_cache.capture.configs import CaptureConfig, PreviewConfig
from teacher_cache.capture.prepare import input_rows
from teacher_cache.engines.server.client import check_server
from teacher_cache.engines.start import check_engine_args_early
from teacher_cache.format import read_manifest, require_same_capture, shown
from teacher_cache.sources import Input, SourceError
from teacher_cache.terminal.early_checks import (
    check_file,
    check_hub_name,
    check_model,
    check_out_cache,
    check_out_folder,
    check_ray_address,
    near_path,
)


def check_early(config: CaptureConfig, rows: Input) -> None:
    """Check paths, names and addresses.

    Args:
        config: Configuration of the capture.
        rows: Its prompts or traces.

    Raises:
        ValueError: Names the option, what was expected and what was found.
        SourceError: If the input is not a file of rows.
        EngineError: If vLLM knows no such argument, or the server does not answer.
        CacheError: If the cache's server does not answer, or the cache is another capture's.
        OSError: If the disk is full.
    """
    check_out_cache(config.out)
    if config.journal is not None:
        check_out_folder(config.journal, "--journal")
    if config.ids_file is not None:
        check_file(config.ids_file, "--ids-file")
    check_input(rows)
    check_model(config.model, "--model")
    check_engine_args_early(config.engine, config.engine_arg)
    _check_settings(config)
    check_ray_address(config.ray_address)
    if config.url is not None:
        check_server(config.url)


def _check_settings(config: CaptureConfig) -> None:
    """Refuse another capture's cache, as far as settings alone tell; this opens its store."""
    manifest = read_manifest(config.out)
    if manifest is not None:
        names = ("top_k", "mass", "capture_prompt", "num_bands")
        header = replace(manifest.header, **{name: getattr(config, name) for name in names})
        require_same_capture(shown(config.out), header, manifest.header)


def check_preview(config: PreviewConfig) -> None:
    """Check the model and the input of a preview; raises as `check_early`."""
    check_model(config.model, "--model")
    path = config.prompts or config.traces
    if path is not None:
        check_input(input_rows(config, path))


def check_input(rows: Input) -> None:
    """Refuse rows that are neither here nor on the hub, or cannot be read; as `check_early`."""
    rows.check_exists(near_path(rows.path))
    if rows.path.exists() and next(iter(rows), None) is None:
        raise SourceError(f"{rows.path}: expected at least one row, found none")
    if rows.may_be_hub_id:
        check_hub_name(str(rows.path), "prompts or traces", "datasets")
