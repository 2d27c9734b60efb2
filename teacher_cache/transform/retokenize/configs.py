"""Settings of `cache-teacher retokenize`, checked before anything heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teacher_cache.capture.configs import CaptureConfig
from teacher_cache.format import CachePath
from teacher_cache.terminal.option import check_options, option, same_option

_student = partial(option, group="Student")


@dataclass(frozen=True, kw_only=True)
class RetokenizeConfig:
    """`cache-teacher retokenize`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    out: CachePath = option("Folder or URI of the student's cache.", is_argument=True)
    student: str = _student("Model folder or hub id with the tokenizer to write in.", basic=True)
    student_revision: str | None = _student("Branch, tag or commit of a hub id.", default=None)
    template_arg: Mapping[str, object] = same_option(CaptureConfig, "template_arg", group="Student")
    think_open: str | None = same_option(
        CaptureConfig,
        "think_open",
        group="Student",
        help="Text that the student writes before its chain of thought, white space included (\\n "
        "is a line break); if its chat template does not show it.",
    )
    think_close: str | None = same_option(
        CaptureConfig,
        "think_close",
        group="Student",
        help="Text that the student writes between chain of thought and answer, likewise.",
    )
    rows: Path | None = option(
        "File, folder or hub id of the captured rows, for caches that do not hold the "
        "prompts' messages.",
        default=None,
        group="Input",
        basic=True,
        unset="the messages in the cache",
    )
    id_field: str = same_option(CaptureConfig, "id_field")
    prompt_field: str | None = same_option(CaptureConfig, "prompt_field")
    apply_chat_template: bool = same_option(CaptureConfig, "apply_chat_template")
    drop_system: bool = same_option(CaptureConfig, "drop_system")
    dataset_config: str | None = same_option(CaptureConfig, "dataset_config")
    split: str = same_option(CaptureConfig, "split")
    teacher: str | None = option(
        "Current location of the teacher's tokenizer.",
        default=None,
        group="Input",
        unset="where it was at capture",
    )
    allow_unsealed: bool = option(
        "Use the committed part of an incomplete capture.",
        default=False,
        group="Input",
    )
    processes: int | None = option(
        "Number of processes that work in parallel.",
        default=None,
        at_least=1,
        unset="one per core",
    )
    journal: Path | None = same_option(CaptureConfig, "journal", group="Other")

    def __post_init__(self) -> None:
        check_options(self)
        if (self.think_open is None) != (self.think_close is None):
            raise ValueError("--think-open and --think-close: expected both or neither")
