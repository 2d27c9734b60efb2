"""Configuration of a view, checked without loading torch."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teacher_cache.format import CachePath
from teacher_cache.pages.choice import ViewConfig, check_choice
from teacher_cache.terminal.option import check_options, option, same_option

_view = partial(same_option, ViewConfig)


@dataclass(frozen=True, kw_only=True)
class StudentViewConfig:
    """One call of `train-student view`."""

    cache: CachePath = _view("cache")
    student: str = option(
        "Folder of a finished run, or a model's folder or hub id.",
    )
    trace: tuple[str, ...] = _view("trace")
    sample: int | None = _view("sample")
    out: Path = _view("out")
    force: bool = _view("force")

    def __post_init__(self) -> None:
        check_options(self)
        check_choice(self.trace, self.sample)
