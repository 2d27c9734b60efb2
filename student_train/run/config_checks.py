"""Options of a run that do not go together, told without loading torch."""

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_train.run.config import TrainConfig


def check_combinations(config: "TrainConfig") -> None:
    """Refuse options that exclude each other.

    Raises:
        ValueError: If there are some; it names them, and says what to do.
    """
    if config.trace_fields is not None and config.where is None:
        raise ValueError("--trace-fields: expected a --where that uses them, got none")
    _ = config.selection  # refuses a lead span beside a budget
    _ = config.objective  # refuses what is no divergence or cannot be known from a cache
    _check_match(config)
    _check_layout(config)
    has_heldout = config.heldout_share > 0 or config.heldout_cache is not None
    if not has_heldout and (config.eval_every is not None or config.select == "heldout"):
        flag = "--select heldout" if config.eval_every is None else "--eval-every"
        raise ValueError(
            f"{flag}: expected held-out traces, from --heldout-share or --heldout-cache"
        )
    if config.patience is not None and config.eval_every is None:
        raise ValueError("--patience: expected --eval-every, how often to measure")
    if config.packing and config.live_teacher is not None:
        raise ValueError("--packing: a live teacher reads rows of one trace; leave it out")


def _check_layout(config: "TrainConfig") -> None:
    if config.sharding != "none" and config.optimizer != "adamw":
        reasons = {
            "adafactor": "adafactor works on whole matrices",
            "adamw8bit": "8-bit states that are split cannot be checkpointed (torchao 0.18)",
        }
        raise ValueError(
            f"--sharding {config.sharding}: {reasons[config.optimizer]}; use --optimizer adamw, "
            "with --offload where its states do not fit"
        )
    if config.offload and config.sharding == "none":
        raise ValueError(
            "--offload: it moves the parts of a split student to the hosts; add --sharding full"
        )
    _check_context_parallel(config)


def _check_context_parallel(config: "TrainConfig") -> None:
    if config.context_parallel == 1:
        return
    reasons = {
        "--attention": config.attention is not None and "it has an attention of its own",
        "--match chunks": config.match == "chunks" and "a chunk may lie in two parts",
        "--live-teacher": config.live_teacher is not None and "it reads whole traces",
        "--router-aux-loss-coef": config.router_aux_loss_coef and "experts are counted in whole",
    }
    for flag, reason in reasons.items():
        if reason:
            raise ValueError(
                f"{flag}: --context-parallel cuts every trace into parts, and {reason}; leave "
                "one of them out"
            )


def _check_match(config: "TrainConfig") -> None:
    if config.match != "chunks" and config.chunk_temperature is not None:
        raise ValueError("--chunk-temperature: it is that of --match chunks; add this")
    if config.match != "samples" and config.ratio_clip is not None:
        raise ValueError("--ratio-clip: it is that of --match samples; add this")
    if config.match == "samples" and config.live_teacher is not None:
        raise ValueError(
            "--live-teacher: --match samples uses the cached logprob of each token alone; leave "
            "one of them out"
        )
    if config.match != "chunks":
        return
    if config.loss_dropout:
        raise ValueError(
            "--loss-dropout: one token takes the likelihood of its whole chunk along; leave "
            "this out, or --match chunks"
        )
    names = ("divergence", "mix", "tail", "loss_temperature", "live_teacher")
    defaults = {item.name: item.default for item in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"--{name.replace('_', '-')}: it belongs to distributions over tokens, which "
                "--match chunks does not use; leave one of them out"
            )
