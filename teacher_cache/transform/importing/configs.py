"""Settings of `cache-teacher import`, checked before anything heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teacher_cache.capture.configs import CaptureConfig
from teacher_cache.format import MAX_K, CachePath
from teacher_cache.sources import RowColumns
from teacher_cache.terminal.option import check_options, option, same_option
from teacher_cache.transform.importing.placing import SHIFTS

FORMATS = ("columns", "axolotl", "distillkit", "server", "trl")
TAILS = ("known", "unknown")
VALUES = ("logprobs", "logits")

_input = partial(option, group="Input")
_columns = partial(option, group="Columns")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`cache-teacher import`."""

    rows: Path = option("File, folder or hub id of the rows.", is_argument=True)
    out: CachePath = option("Folder or URI of the cache; run again to resume.", is_argument=True)
    format: str = _input(
        "Program that wrote the rows: plain columns of ids and logprobs, Axolotl's kd rows, "
        "DistillKit's Parquet, answers of a vLLM server, or what TRL's vLLM client returned.",
        basic=True,
        choices=FORMATS,
    )
    model: str = option(
        "Teacher that made the distributions, for its tokenizer and vocabulary: a model folder or "
        "a hub id. It is taken at your word; `audit` compares.",
        basic=True,
        group="Teacher",
    )
    revision: str | None = same_option(CaptureConfig, "revision")
    trust_remote_code: bool = same_option(CaptureConfig, "trust_remote_code")
    template_arg: Mapping[str, object] = same_option(CaptureConfig, "template_arg")
    think_open: str | None = same_option(CaptureConfig, "think_open")
    think_close: str | None = same_option(CaptureConfig, "think_close")
    values: str = _input(
        "What the rows hold: logprobs, or logits without a normaliser.",
        default="logprobs",
        choices=VALUES,
    )
    tail: str = _input(
        "Whether the rows tell the probability outside their entries. Those that do not are "
        "imported only with `unknown`, which marks the cache: students then need --tail "
        "renormalise.",
        default="known",
        basic=True,
        choices=TAILS,
    )
    row_shift: int | None = _input(
        "Tokens between a row and the token that it is the distribution over: 0 beside it, 1 "
        "beside the one before it, as a model puts its logits out.",
        default=None,
        at_least=min(SHIFTS),
        at_most=max(SHIFTS),
        unset="where the rows fit their tokens",
    )
    id_field: str = same_option(CaptureConfig, "id_field")
    dataset_config: str | None = same_option(CaptureConfig, "dataset_config")
    split: str = same_option(CaptureConfig, "split")
    strict: bool = same_option(CaptureConfig, "strict")
    token_ids_column: str | None = _columns(
        "Column of a trace's token ids.", default=None, unset="token_ids"
    )
    top_ids_column: str | None = _columns(
        "Column of each token's candidates, a list of lists of ids.", default=None, unset="top_ids"
    )
    values_column: str | None = _columns(
        "Column of their logprobs or logits; for raw rows of Axolotl its logprobs_field.",
        default=None,
        unset="top_logprobs, or logprobs",
    )
    log_normaliser_column: str | None = _columns(
        "Column of each token's log-sum-exp over the whole vocabulary, which makes logits "
        "logprobs.",
        default=None,
        unset="none",
    )
    num_prompt_column: str | None = _columns(
        "Column with the number of prompt tokens.",
        default=None,
        unset="up to the first of `labels` that is not -100, if there are any",
    )
    compression_config: Path | None = option(
        "DistillKit's compression_config.yaml.",
        default=None,
        group="Input",
        unset="the one beside the rows",
    )
    top_k: int = same_option(CaptureConfig, "top_k", default=MAX_K)
    mass: float = same_option(CaptureConfig, "mass", default=1.0)
    num_bands: int = same_option(CaptureConfig, "num_bands")
    journal: Path | None = same_option(CaptureConfig, "journal")

    def __post_init__(self) -> None:
        check_options(self)
        if (self.think_open is None) != (self.think_close is None):
            raise ValueError("--think-open and --think-close: expected both or neither")
        self._check_columns()
        if self.compression_config is not None and self.format != "distillkit":
            raise ValueError("--compression-config: only --format distillkit reads one")
        if self.row_shift is not None and self.format in ("server", "trl"):
            raise ValueError(f"--row-shift: rows of --format {self.format} say where they belong")
        if self.values == "logits":
            self._check_logits()
        elif self.log_normaliser_column is not None:
            raise ValueError(
                "--log-normaliser-column: it makes logits logprobs; give --values logits, or leave "
                "it out"
            )

    @property
    def columns(self) -> RowColumns:
        """Layout of raw rows of Axolotl: a conversation."""
        return RowColumns(id_field=self.id_field)

    def _check_columns(self) -> None:
        used = {
            "columns": ("token_ids", "top_ids", "values", "log_normaliser", "num_prompt"),
            "axolotl": ("values",),
        }.get(self.format, ())
        for name in ("token_ids", "top_ids", "values", "log_normaliser", "num_prompt"):
            if getattr(self, f"{name}_column") is not None and name not in used:
                raise ValueError(
                    f"--{name.replace('_', '-')}-column: --format {self.format} has its own columns"
                )

    def _check_logits(self) -> None:
        if self.format != "columns":
            raise ValueError(f"--values logits: --format {self.format} says what its values are")
        if self.log_normaliser_column is None and self.tail == "known":
            raise ValueError(
                "--values logits: without a normaliser they do not tell the probability outside "
                "the entries. Name its column with --log-normaliser-column, or import them with "
                "--tail unknown"
            )
        if self.log_normaliser_column is not None and self.tail == "unknown":
            raise ValueError("--tail unknown: with --log-normaliser-column the tail is known")
