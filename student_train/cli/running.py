"""`train-student run`."""

from pathlib import Path
from typing import Any

import click

from student_train.cli.options import config_option, split_names, split_numbers
from student_train.data.tokens import LOSS_RANGES, WHOLES
from student_train.run.config import (
    DTYPES,
    LORA_OUTPUTS,
    LOSS_REDUCTIONS,
    OPTIMIZERS,
    SCHEDULES,
    SELECTIONS,
    SHARDINGS,
    TRACKERS,
    TrainConfig,
)


@click.command("run")
@config_option
@click.option(
    "--cache", required=True, multiple=True,
    help="Cache folder or URI, made by cache-teacher; several are mixed.",
)  # fmt: skip
@click.option("--student", required=True, help="Model folder or hub id to start from.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path),
    help="Folder of the run; goes on from the checkpoint it holds.",
)  # fmt: skip
@click.option(
    "--student-revision", default=TrainConfig.student_revision,
    help="Revision of the student's hub repository.",
)  # fmt: skip
@click.option(
    "--allow-unsealed", is_flag=True, default=TrainConfig.allow_unsealed,
    help="Train on the shards committed so far of a capture that is not complete.",
)  # fmt: skip
@click.option(
    "--prefix-cache", type=click.Path(path_type=Path), default=TrainConfig.prefix_cache,
    help="Local folder that keeps what is read of a remote cache; processes and runs share it.",
)  # fmt: skip
@click.option(
    "--prefix-cache-bytes", type=int, default=TrainConfig.prefix_cache_bytes,
    help="Size of that folder; what was not used for longest makes room.",
)  # fmt: skip
@click.option(
    "--cache-weights", type=click.UNPROCESSED, callback=split_numbers,
    default=TrainConfig.cache_weights,
    help="Share of each cache in an epoch, e.g. 3,1; without it every trace comes once.",
)  # fmt: skip
@click.option(
    "--where", default=TrainConfig.where,
    help="""Train on traces whose fields fulfil this, e.g. 'verdict == "correct"'.""",
)  # fmt: skip
@click.option(
    "--heldout-share", type=float, default=TrainConfig.heldout_share,
    help="Proportion of the traces, chosen by their ids, that is never trained on.",
)  # fmt: skip
@click.option(
    "--lead-span", type=float, default=TrainConfig.lead_span,
    help="Proportion of every trace to train on, from its start, in (0, 1].",
)  # fmt: skip
@click.option(
    "--max-tokens", type=int, default=TrainConfig.max_tokens,
    help="Number of tokens of every trace to train on, instead of a lead span.",
)  # fmt: skip
@click.option(
    "--sections", type=click.UNPROCESSED, callback=split_names,
    default=",".join(TrainConfig.sections),
    help="Sections whose tokens enter the loss, of prompt,cot,answer.",
)  # fmt: skip
@click.option(
    "--loss-on", type=click.Choice(LOSS_RANGES), default=TrainConfig.loss_on,
    help="Which part of a trace has the length of the lead span; tokens before it are context.",
)  # fmt: skip
@click.option(
    "--lead-span-of", type=click.Choice(WHOLES), default=TrainConfig.lead_span_of,
    help="What the lead span is a proportion of; reasoning leaves the answer out first.",
)  # fmt: skip
@click.option(
    "--loss-dropout", type=float, default=TrainConfig.loss_dropout,
    help="Share of every trace's valid tokens left out at random, drawn anew in every epoch.",
)  # fmt: skip
@click.option(
    "--live-teacher", default=TrainConfig.live_teacher,
    help="The cache's teacher, kept in memory to train on its whole distributions instead of the "
    "cached entries; for small teachers, to see what the cache loses.",
)  # fmt: skip
@click.option(
    "--top-k", type=int, default=TrainConfig.top_k,
    help="Use at most so many of the cached entries of every token; all of them otherwise.",
)  # fmt: skip
@click.option(
    "--mass", type=float, default=TrainConfig.mass,
    help="Use the fewest cached entries of every token that reach this probability.",
)  # fmt: skip
@click.option(
    "--ce-weight", type=float, default=TrainConfig.ce_weight,
    help="Share w of the cross entropy: loss = (1 - w) KL + w CE.",
)  # fmt: skip
@click.option(
    "--loss-reduction", type=click.Choice(LOSS_REDUCTIONS), default=TrainConfig.loss_reduction,
    help="What weighs the same in a step: every valid token or every trace.",
)  # fmt: skip
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default=TrainConfig.optimizer,
    help="adamw8bit needs torchao or bitsandbytes.",
)  # fmt: skip
@click.option("--lr", type=float, default=TrainConfig.lr, help="Peak learning rate.")
@click.option(
    "--schedule", type=click.Choice(SCHEDULES), default=TrainConfig.schedule,
    help="Course of the learning rate after warm-up; onecycle is torch's, as in the paper.",
)  # fmt: skip
@click.option(
    "--warmup", type=float, default=TrainConfig.warmup,
    help="Proportion of all steps in which the learning rate rises from 0.",
)  # fmt: skip
@click.option(
    "--weight-decay", type=float, default=TrainConfig.weight_decay,
    help="On matrices only.",
)  # fmt: skip
@click.option(
    "--clip-norm", type=float, default=TrainConfig.clip_norm,
    help="Largest norm of the gradient; 0 does not clip.",
)  # fmt: skip
@click.option(
    "--epochs", type=int, default=TrainConfig.epochs, help="Times that every trace is seen."
)
@click.option(
    "--max-steps", type=int, default=TrainConfig.max_steps,
    help="End after so many steps, if the epochs have not ended before.",
)  # fmt: skip
@click.option(
    "--batch-traces", type=int, default=TrainConfig.batch_traces,
    help="Traces per step, over all processes.",
)  # fmt: skip
@click.option(
    "--batch-tokens", type=int, default=TrainConfig.batch_tokens,
    help="Cap of tokens per forward pass, padding included; lower it when memory runs out.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=TrainConfig.dtype,
    help="Precision of the matrix products; weights are float32.",
)  # fmt: skip
@click.option(
    "--packing/--no-packing", default=TrainConfig.packing,
    help="Let short traces share a row, where the student's attention can keep them apart. "
    "Default: on a GPU, where few long rows are faster than many short ones.",
)  # fmt: skip
@click.option(
    "--attention", default=TrainConfig.attention,
    help="Backend by its name in transformers: sdpa, eager, flash_attention_2, ... Default: "
    "FlashAttention where it is installed and --dtype is bf16, else the student's own.",
)  # fmt: skip
@click.option(
    "--gradient-checkpointing", is_flag=True, default=TrainConfig.gradient_checkpointing,
    help="Compute activations twice instead of keeping them.",
)  # fmt: skip
@click.option(
    "--sharding", type=click.Choice(SHARDINGS), default=TrainConfig.sharding,
    help="full splits weights, gradients and optimizer over the processes (FSDP2).",
)  # fmt: skip
@click.option(
    "--compile", is_flag=True, default=TrainConfig.compile,
    help="Compile the student's layers with torch.compile; takes a minute at first.",
)  # fmt: skip
@click.option(
    "--lora-rank", type=int, default=TrainConfig.lora_rank,
    help="Train adapters of this rank beside frozen weights, instead of all weights.",
)  # fmt: skip
@click.option(
    "--lora-alpha", type=int, default=TrainConfig.lora_alpha,
    help="Adapters are multiplied by alpha / rank.",
)  # fmt: skip
@click.option(
    "--lora-targets", type=click.UNPROCESSED, callback=split_names,
    default=",".join(TrainConfig.lora_targets),
    help="Layers to adapt, as q_proj,v_proj; all-linear is all but the head.",
)  # fmt: skip
@click.option(
    "--lora-output", type=click.Choice(LORA_OUTPUTS), default=TrainConfig.lora_output,
    help="What RUN/model holds: the whole student, or the adapter alone for peft.",
)  # fmt: skip
@click.option(
    "--shuffle-lanes", type=int, default=TrainConfig.shuffle_lanes,
    help="Lanes of the order, fixed for a run; best a multiple of the number of processes.",
)  # fmt: skip
@click.option("--seed", type=int, default=TrainConfig.seed, help="Of order and dropout.")
@click.option(
    "--eval-every", type=int, default=TrainConfig.eval_every,
    help="Steps between measurements on held-out traces, whole ones; otherwise at the end.",
)  # fmt: skip
@click.option(
    "--eval-cache", default=TrainConfig.eval_cache,
    help="Cache whose traces are the held-out ones, instead of --heldout-share.",
)  # fmt: skip
@click.option(
    "--eval-traces", type=int, default=TrainConfig.eval_traces,
    help="Measure on at most so many; they are kept in memory.",
)  # fmt: skip
@click.option(
    "--select", type=click.Choice(SELECTIONS), default=TrainConfig.select,
    help="The student that is written: after the last step, or with the lowest held-out KL.",
)  # fmt: skip
@click.option(
    "--save-every", type=int, default=TrainConfig.save_every, help="Steps between checkpoints."
)
@click.option("--keep-last", type=int, default=TrainConfig.keep_last, help="Checkpoints that stay.")
@click.option(
    "--log-every", type=int, default=TrainConfig.log_every,
    help="Steps between lines of metrics.jsonl.",
)  # fmt: skip
@click.option(
    "--tracker", type=click.Choice(TRACKERS), default=TrainConfig.tracker,
    help="Where the metrics go beside metrics.jsonl.",
)  # fmt: skip
def run_command(**options: Any) -> None:  # noqa: ANN401  # mirrors TrainConfig
    """Distil a cached teacher into a student.

    \b
    Example:
      train-student run --cache cache --student Qwen/Qwen3-0.6B --out run --lead-span 0.5

    Run it again to go on after an interruption. RUN/model is the finished student. Start it with
    `accelerate launch -m student_train.cli run ...` to use several devices.
    """
    config = TrainConfig(**options)
    from student_train.run.loop import train

    result = train(config)
    if result.was_finished:
        click.echo(f"{config.out} is finished already; nothing was done", err=True)
    click.echo(
        f"{result.model}: {result.num_steps:,} steps, loss {result.metrics['loss']:.4f}, "
        f"{result.metrics['bytes_read']:,} bytes read"
    )
