"""Checks of a capture before a tokenizer is loaded: failing takes a second, not a minute."""

from teacher_cache.capture.configs import CaptureConfig
from teacher_cache.format import open_store
from teacher_cache.sources import Input
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
        CacheError: If the cache's server does not answer.
        OSError: If the disk is full.
    """
    check_out_cache(config.out)
    if config.journal is not None:
        check_out_folder(config.journal, "--journal")
    if config.ids_file is not None:
        check_file(config.ids_file, "--ids-file")
    rows.check_exists(near_path(rows.path))
    if rows.may_be_hub_id:
        check_hub_name(str(rows.path), "prompts or traces", "datasets")
    check_model(config.model, "--model")
    open_store(config.out)  # checks that the server answers
    check_ray_address(config.ray_address)
