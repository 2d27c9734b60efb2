"""What can be set for a run, checked without loading torch."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from student_train.data.tokens import ALL_SECTIONS, TokenSelection
from student_train.model.lora import Lora
from teacher_cache.format import PrefixCache, shown

LOSS_REDUCTIONS = ("token", "sequence")
OPTIMIZERS = ("adamw", "adafactor", "adamw8bit")
SCHEDULES = ("cosine", "linear", "constant", "onecycle")
SHARDINGS = ("none", "full")
SELECTIONS = ("last", "heldout")
TRACKERS = ("tensorboard", "wandb", "none")
DTYPES = ("float32", "bf16")
LORA_OUTPUTS = ("merged", "adapter")

# They say where things lie and how often something is written, or trade time for memory: a run
# may go on with other values. Cache and student are compared by fingerprint instead of by name.
CHANGEABLE = frozenset(
    {
        "cache",
        "student",
        "student_revision",
        "out",
        "allow_unsealed",
        "prefix_cache",
        "prefix_cache_bytes",
        "batch_tokens",
        "packing",
        "attention",
        "gradient_checkpointing",
        "sharding",
        "eval_cache",
        "tracker",
        "compile",
        "lora_output",
        "save_every",
        "keep_last",
        "log_every",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Command-line options mirror these fields."""

    cache: tuple[str, ...]  # one or several
    student: str
    out: Path
    student_revision: str | None = None
    allow_unsealed: bool = False
    prefix_cache: Path | None = None
    prefix_cache_bytes: int = 50_000_000_000
    cache_weights: tuple[float, ...] | None = None  # every trace once per epoch
    where: str | None = None
    heldout_share: float = 0.0
    lead_span: float | None = None  # with max_tokens also None: whole traces
    max_tokens: int | None = None
    sections: tuple[str, ...] = ALL_SECTIONS
    loss_on: str = TokenSelection.loss_on
    lead_span_of: str = TokenSelection.lead_span_of
    loss_dropout: float = 0.0
    live_teacher: str | None = None
    top_k: int | None = None  # as captured
    mass: float | None = None  # as captured
    ce_weight: float = 0.5  # as in arXiv 2512.21002
    loss_reduction: str = "token"
    optimizer: str = "adamw"
    lr: float = 1e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    batch_traces: int = 16
    batch_tokens: int = 16_384
    dtype: str = "float32"
    packing: bool | None = None  # on a GPU; a CPU is faster without
    attention: str | None = None  # FlashAttention where it can be used, else the model's own choice
    gradient_checkpointing: bool = False
    sharding: str = "none"
    compile: bool = False
    lora_rank: int | None = None  # all weights are trained
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_output: str = "merged"
    shuffle_lanes: int = 8
    seed: int = 0
    eval_every: int | None = None  # at the end
    eval_cache: str | None = None
    eval_traces: int = 256
    select: str = "last"
    save_every: int = 500
    keep_last: int = 1
    log_every: int = 1
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        _ = self.selection  # refuses lead spans and sections that cannot be
        for name, choices in (
            ("loss_reduction", LOSS_REDUCTIONS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("sharding", SHARDINGS),
            ("select", SELECTIONS),
            ("tracker", TRACKERS),
            ("dtype", DTYPES),
            ("lora_output", LORA_OUTPUTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in (
            "epochs", "max_steps", "batch_traces", "batch_tokens", "shuffle_lanes", "save_every",
            "keep_last", "log_every", "eval_every", "eval_traces", "prefix_cache_bytes",
            "lora_rank", "lora_alpha",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("ce_weight", "warmup"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if isinstance(self.cache, str) or not self.cache:
            raise ValueError(f"cache: expected one or several in a tuple, got {self.cache!r}")
        for weight in self.cache_weights or ():
            if not 0 < weight < math.inf:
                raise ValueError(f"cache_weights: expected positive numbers, got {weight}")
        if not 0.0 <= self.heldout_share < 1.0:
            raise ValueError(f"heldout_share: expected 0 to below 1, got {self.heldout_share}")
        if not 0.0 <= self.loss_dropout < 1.0:
            raise ValueError(f"loss_dropout: expected a share in [0, 1), got {self.loss_dropout}")
        if self.sharding == "full" and self.optimizer == "adafactor":
            raise ValueError(
                "sharding full: adafactor works on whole matrices; use --optimizer adamw, or "
                "adamw8bit with torchao"
            )
        if self.sharding == "full" and self.compile:
            raise ValueError("sharding full: compiled layers cannot be split; leave out --compile")
        has_heldout = self.heldout_share > 0 or self.eval_cache is not None
        if not has_heldout and (self.eval_every is not None or self.select == "heldout"):
            name = "select heldout" if self.eval_every is None else "eval_every"
            raise ValueError(f"{name}: give held-out traces: a heldout_share or an eval_cache")
        if not self.lora_targets:
            raise ValueError("lora_targets: expected names of layers, got none")
        if self.packing and self.live_teacher is not None:
            raise ValueError("packing: a live teacher reads rows of one trace; leave it out")
        for name in ("lr", "weight_decay", "clip_norm", "seed"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    @property
    def selection(self) -> TokenSelection:
        """Which tokens of a trace are trained on."""
        return TokenSelection(
            self.lead_span, self.max_tokens, self.sections, self.loss_on, self.lead_span_of
        )

    def packs_on(self, device_type: str) -> bool:
        """Whether traces may share rows on such a device."""
        if self.live_teacher is not None:  # reads rows of one trace
            return False
        return device_type != "cpu" if self.packing is None else self.packing

    @property
    def lora(self) -> Lora | None:
        """The adapters, or None where all weights are trained."""
        if self.lora_rank is None:
            return None
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets, self.seed)

    @property
    def kept_prefixes(self) -> PrefixCache | None:
        """Where what is read of the caches is kept."""
        if self.prefix_cache is None:
            return None
        return PrefixCache(self.prefix_cache, self.prefix_cache_bytes)

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return {
            **asdict(self),
            "cache": [shown(path) for path in self.cache],  # without credentials
            "out": str(self.out),
            "eval_cache": self.eval_cache and shown(self.eval_cache),
            "prefix_cache": self.prefix_cache and str(self.prefix_cache),
            "sections": list(self.sections),
            "lora_targets": list(self.lora_targets),
            "cache_weights": self.cache_weights and list(self.cache_weights),
        }
