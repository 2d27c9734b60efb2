"""Configuration of a run, checked without loading torch."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from student_train.batch.loss_tokens import Teaching
from student_train.data.order import SHUFFLE_WINDOW
from student_train.data.tokens import TokenSelection
from student_train.model.lora import Lora
from student_train.objective import DIVERGENCES, TAILS, Objective
from student_train.run.config_checks import check_combinations
from teacher_cache.format import CachePath, PrefixCache, shown
from teacher_cache.format.lead_spans import LeadSpans, in_json
from teacher_cache.terminal.option import check_options, option, same_option

LOSS_REDUCTIONS = ("token", "sequence")
OPTIMIZERS = ("adamw", "adafactor", "adamw8bit")
SCHEDULES = ("cosine", "linear", "constant", "onecycle")
SHARDINGS = ("none", "full", "hybrid")
SELECTIONS = ("last", "heldout")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "none")
DTYPES = ("float32", "bfloat16")
SAVE_DTYPES = (*DTYPES, "float16")
LORA_OUTPUTS = ("merged", "adapter")
MATCHES = ("tokens", "chunks", "samples")
CHUNK_TEMPERATURE = 100.0  # that of arXiv 2503.20083
RATIO_CLIP = 0.2  # that of arXiv 1707.06347

_data = partial(option, group="Data")
_student = partial(option, group="Student")
_tokens = partial(same_option, TokenSelection)
_entering = partial(option, group="What enters the loss")
_loss = partial(option, group="Loss")
_optimizer = partial(option, group="Optimizer")
_speed = partial(option, group="Memory and speed")
_lora = partial(option, group="LoRA")
_measuring = partial(option, group="Measuring")
_output = partial(option, group="Output")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Changeable options say where things are and how often something is written, or trade time for
    memory: a run may be resumed with other values. Caches and student are compared by fingerprint
    instead of by name.
    """

    cache: tuple[CachePath, ...] = _data(
        "Folder or URI of a cache, made by cache-teacher; repeat it to mix several.",
        basic=True,
        is_repeatable=True,
        changeable=True,
    )
    cache_weights: tuple[float, ...] | None = _data(
        "Share of each cache in an epoch, such as 3,1.",
        default=None,
        above=0,
        unset="every trace once per epoch",
    )
    where: str | None = _data(
        """Train on traces whose fields fulfil this, such as 'verdict == "correct"'.""",
        default=None,
        unset="all traces",
    )
    trace_fields: Path | None = _data(
        "JSONL of further fields of the traces that --where can ask for, such as traces.jsonl of "
        "profile.",
        default=None,
        changeable=True,
    )
    heldout_share: float = _data(
        "Proportion of the traces, chosen by their ids, that is held out for measurements.",
        default=0.0,
        basic=True,
        at_least=0,
        below=1,
    )
    seed: int = _data(
        "Seed for the order of traces, the lead spans of a mixture, loss dropout and adapters.",
        default=0,
        at_least=0,
    )
    shuffle_window: float = _data(
        "Share of the shards whose traces are mixed at any time; 50 shards at least. Traces that "
        "were read and wait for their turn take up to 0.5 GiB of a process' memory and beyond it, "
        "for the default, a third of what an epoch reads in TMPDIR (of fewer than 100 shards, "
        "most of it).",
        default=SHUFFLE_WINDOW,
        above=0,
        at_most=1,
    )
    allow_unsealed: bool = _data(
        "Train on the shards committed so far of a capture that is not complete.",
        default=False,
        changeable=True,
    )
    prefix_cache: Path | None = _data(
        "Local folder for the parts read from a remote cache; processes and runs share it.",
        default=None,
        changeable=True,
    )
    prefix_cache_bytes: int = _data(
        "Largest size of that folder in bytes; the least recently used parts make room.",
        default=50_000_000_000,
        at_least=1,
        changeable=True,
    )
    other_teacher: bool = _data(
        "Train on rollouts that another teacher scored than the one that the student has learned "
        "from so far.",
        default=False,
        changeable=True,
    )
    stale_rollouts: bool = _data(
        "Train on rollouts of another student than the one to start from; the metric staleness "
        "says how far it has moved since.",
        default=False,
        changeable=True,
    )
    student: str = _student("Model folder or hub id to start from.", basic=True, changeable=True)
    student_revision: str | None = _student(
        "Branch, tag or commit of a hub id.", default=None, changeable=True
    )
    chat_template: str = _student(
        "Whose chat template, special tokens and end tokens RUN/model gets: the cache's, in which "
        "its traces were rendered, or the student's own.",
        default="cache",
        choices=("cache", "student"),
    )
    lead_span: float | LeadSpans | None = _tokens("lead_span")
    trace_tokens: int | LeadSpans | None = _tokens("trace_tokens")
    sections: tuple[str, ...] = _tokens("sections")
    loss_on: str = _tokens("loss_on")
    lead_span_of: str = _tokens("lead_span_of")
    loss_dropout: float = _entering(
        "Proportion of every trace's loss tokens that is left out at random, drawn anew in every "
        "epoch.",
        default=0.0,
        at_least=0,
        below=1,
    )
    top_k: int | None = _entering(
        "Largest number of cached entries to use per token.",
        default=None,
        at_least=1,
        unset="as captured",
    )
    mass: float | None = _entering(
        "Probability that the cached entries used must reach, with as few of them as possible.",
        default=None,
        above=0,
        at_most=1,
        unset="as captured",
    )
    divergence: str = _loss(
        "Divergence D between teacher and student; forward_kl covers all that the teacher does, "
        "reverse_kl what it does most.",
        default=Objective.divergence,
        choices=DIVERGENCES,
    )
    mix: float | None = _loss(
        "Weight inside combined_kl, jsd, skew_kl and skew_reverse_kl.",
        default=None,
        above=0,
        below=1,
        unset="0.5, or 0.1 for the skew divergences",
    )
    tail: str = _loss(
        "Treatment of the teacher's mass on ids that were not kept: one more outcome, "
        "impossible (the kept ones are renormalised), or left out of the sum.",
        default=Objective.tail,
        choices=TAILS,
    )
    loss_temperature: float = _loss(
        "Temperature of both distributions in D; other than 1 with --tail renormalise alone.",
        default=Objective.temperature,
        above=0,
    )
    ce_weight: float = _loss(
        "Share w of the cross entropy: loss = (1 - w) D + w CE. Tokens of a response without a "
        "distribution have w CE alone.",
        default=Objective.ce_weight,
        basic=True,
        at_least=0,
        at_most=1,
    )
    match: str = _loss(
        "What is matched with the teacher's: distributions over tokens; the likelihoods of "
        "chunks of text that both tokenizers write in whole tokens (approximate likelihood "
        "matching, for caches from `cache-teacher retokenize`); or, of traces that the student "
        "sampled, the sampled token alone (policy gradient, as arXiv 2604.13010).",
        default="tokens",
        choices=MATCHES,
    )
    chunk_temperature: float | None = _loss(
        "Temperature of the chunks' likelihoods, with --match chunks.",
        default=None,
        at_least=1,
        unset="100",
    )
    ratio_clip: float | None = _loss(
        "Change of a sampled token's probability since the rollout beyond which it has no "
        "gradient, with --match samples.",
        default=None,
        above=0,
        below=1,
        unset="0.2",
    )
    loss_reduction: str = _loss(
        "Unit that weighs the same in a step: every loss token, or every trace (sequence).",
        default="token",
        choices=LOSS_REDUCTIONS,
    )
    router_aux_loss_coef: float = _loss(
        "Weight of the auxiliary loss of a mixture of experts, which lets its routers use all "
        "experts alike; what the student's config says is not read.",
        default=0.0,
        at_least=0,
    )
    live_teacher: str | None = _loss(
        "Folder or hub id of the cache's teacher, kept in memory to train on its whole "
        "distributions instead of the cached entries; for small teachers, to see what the cache "
        "loses.",
        default=None,
    )
    optimizer: str = _optimizer(
        "Optimizer; adamw8bit saves memory and needs torchao or bitsandbytes.",
        default="adamw",
        choices=OPTIMIZERS,
    )
    lr: float = _optimizer("Peak learning rate.", default=1e-5, basic=True, at_least=0)
    schedule: str = _optimizer(
        "Course of the learning rate after warm-up; onecycle is torch's, as in the paper.",
        default="cosine",
        choices=SCHEDULES,
    )
    warmup: float = _optimizer(
        "Proportion of all steps in which the learning rate rises from 0.",
        default=0.03,
        at_least=0,
        at_most=1,
    )
    weight_decay: float = _optimizer("Weight decay, for matrices only.", default=0.05, at_least=0)
    clip_norm: float = _optimizer(
        "Largest norm of the gradient; 0 does not clip.", default=1.0, at_least=0
    )
    epochs: int = _optimizer("Passes over all traces.", default=1, basic=True, at_least=1)
    max_steps: int | None = _optimizer(
        "Stop after this many steps, unless the epochs end earlier.",
        default=None,
        at_least=1,
    )
    batch_traces: int = _optimizer(
        "Traces per step, over all processes.", default=16, basic=True, at_least=1
    )
    batch_tokens: int = _speed(
        "Largest number of tokens per forward pass, padding included; lower it when memory runs "
        "out.",
        default=16_384,
        basic=True,
        at_least=1,
        changeable=True,
    )
    dtype: str | None = _speed(
        "Precision of the matrix products; weights that are trained are float32 in any case.",
        default=None,
        basic=True,
        choices=DTYPES,
        unset="as accelerate is configured; else bfloat16 on a GPU, float32 on a CPU",
    )
    packing: bool | None = _speed(
        "Let short traces share a row, where the student's attention can keep them apart: few "
        "long rows are faster on a GPU, many short ones on a CPU.",
        default=None,
        unset="on a GPU",
        changeable=True,
    )
    attention: str | None = _speed(
        "Attention backend by its name in transformers: sdpa, eager, flash_attention_2, ...",
        default=None,
        unset="FlashAttention (3 on Hopper, or 2) where it is installed and --dtype is bfloat16, "
        "else the student's own",
        changeable=True,
    )
    gradient_checkpointing: bool = _speed(
        "Recompute activations in the backward pass; saves memory, costs time.",
        default=False,
        changeable=True,
    )
    sharding: str = _speed(
        "full splits weights, gradients and optimizer over the processes (FSDP2), for students "
        "that do not fit on one GPU; hybrid over those of each node, with copies on every node "
        "(HSDP), for nodes that are connected slowly.",
        default="none",
        choices=SHARDINGS,
        changeable=True,
    )
    offload: bool = _speed(
        "With --sharding, keep the parts of weights, gradients and optimizer in memory of their "
        "hosts, where the optimizer works: little is left on a GPU, and steps are slower.",
        default=False,
        changeable=True,
    )
    context_parallel: int = _speed(
        "Processes that share every trace, each with a part of its tokens, for traces too long for "
        "one GPU.",
        default=1,
        at_least=1,
        changeable=True,
    )
    compile: bool = _speed(
        "Compile the student's layers with torch.compile; takes a minute at first.",
        default=False,
        changeable=True,
    )
    lora_rank: int | None = _lora(
        "Train adapters of this rank beside frozen weights, instead of all weights.",
        default=None,
        basic=True,
        at_least=1,
        unset="all weights",
    )
    lora_alpha: int = _lora("Adapters are multiplied by alpha / rank.", default=32, at_least=1)
    lora_targets: tuple[str, ...] = _lora(
        "Layers to adapt, such as q_proj,v_proj; all-linear is all but the head and the routers of "
        "experts.",
        default=("all-linear",),
    )
    lora_output: str = _lora(
        "Content of RUN/model: the whole student, or the adapter alone for peft.",
        default="merged",
        choices=LORA_OUTPUTS,
        changeable=True,
    )
    eval_every: int | None = _measuring(
        "Steps between measurements on whole held-out traces.",
        default=None,
        at_least=1,
        unset="once, at the end",
    )
    patience: int | None = _measuring(
        "End the run when so many measurements in turn have not lowered the held-out KL.",
        default=None,
        at_least=1,
        unset="runs to its last step",
        changeable=True,
    )
    heldout_cache: CachePath | None = _measuring(
        "Cache whose traces are the held-out ones, instead of --heldout-share.",
        default=None,
        changeable=True,
    )
    heldout_traces: int = _measuring(
        "Largest number of held-out traces to measure on; they are kept in memory.",
        default=256,
        at_least=1,
    )
    select: str = _measuring(
        "Student to write: the one after the last step, or the one with the lowest held-out KL.",
        default="last",
        choices=SELECTIONS,
    )
    out: Path = _output("Folder of the run; run again to resume.", basic=True, changeable=True)
    save_every: int = _output(
        "Steps between checkpoints.", default=500, at_least=1, changeable=True
    )
    estimate: bool = _output(
        "Print the memory that each device will need, and stop; nothing is loaded or written.",
        default=False,
        changeable=True,
    )
    save_dtype: str | None = _output(
        "Dtype of the weights in RUN/model; checkpoints keep float32.",
        default=None,
        choices=SAVE_DTYPES,
        changeable=True,
        unset="that of the student it began with",
    )
    keep_last: int = _output(
        "Number of checkpoints to keep; a run falls back on the one before a damaged one.",
        default=2,
        at_least=1,
        changeable=True,
    )
    log_every: int = _output(
        "Steps between lines of metrics.jsonl.", default=1, at_least=1, changeable=True
    )
    tracker: str = _output(
        "Program that shows the metrics, besides metrics.jsonl.",
        default="tensorboard",
        choices=TRACKERS,
        changeable=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_combinations(self)

    @property
    def selection(self) -> TokenSelection:
        """Selection of the tokens of a trace that are trained on."""
        return TokenSelection(
            self.lead_span, self.trace_tokens, self.sections, self.loss_on, self.lead_span_of
        )

    @property
    def objective(self) -> Objective:
        """Objective to minimise."""
        return Objective(
            self.divergence, self.mix, self.tail, self.loss_temperature, self.ce_weight
        )

    @property
    def teaching(self) -> Teaching:
        """What the objective learns from."""
        return Teaching(hard_labels=self.ce_weight > 0, chunks=self.match == "chunks")

    @property
    def matched_chunks_at(self) -> float | None:
        """Temperature of the chunks' likelihoods; None where distributions are matched."""
        if self.match != "chunks":
            return None
        return CHUNK_TEMPERATURE if self.chunk_temperature is None else self.chunk_temperature

    @property
    def used_ratio_clip(self) -> float | None:
        """Clip of the policy gradient on sampled tokens; None where they have another loss."""
        if self.match != "samples":
            return None
        return RATIO_CLIP if self.ratio_clip is None else self.ratio_clip

    @property
    def loss_text(self) -> str:
        """The loss in words."""
        if self.used_ratio_clip is not None:
            return (
                f"policy gradient on the student's own tokens, ratios clipped at "
                f"{self.used_ratio_clip:g}; on others {self.objective}"
            )
        if self.matched_chunks_at is None:
            return str(self.objective)
        return (
            f"{1 - self.ce_weight:g} divergence of chunk likelihoods at temperature "
            f"{self.matched_chunks_at:g}, + {self.ce_weight:g} cross entropy"
        )

    def packs_on(self, device_type: str) -> bool:
        """Whether traces may share rows on such a device."""
        if self.live_teacher is not None:  # it reads rows of one trace
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
        """Local store of the parts read from remote caches."""
        if self.prefix_cache is None:
            return None
        return PrefixCache(self.prefix_cache, self.prefix_cache_bytes)

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return {
            **asdict(self),
            "cache": [shown(path) for path in self.cache],  # without credentials
            "out": str(self.out),
            "trace_fields": self.trace_fields and str(self.trace_fields),
            "heldout_cache": self.heldout_cache and shown(self.heldout_cache),
            "prefix_cache": self.prefix_cache and str(self.prefix_cache),
            "lead_span": in_json(self.lead_span),
            "trace_tokens": in_json(self.trace_tokens),
            "sections": list(self.sections),
            "lora_targets": list(self.lora_targets),
            "cache_weights": self.cache_weights and list(self.cache_weights),
        }
