"""One training run, from an open cache to a finished student, to be read from top to bottom."""

import hashlib
import importlib.util
import logging
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor
from transformers import PreTrainedModel

from student_train.batch.micro_batch import MicroBatch, empty_micro_batch, micro_batches, normaliser
from student_train.data.stream import StreamStep, TraceStream
from student_train.data.tokens import LossDropout, TokenSelection
from student_train.data.traces import TrainingData, open_data
from student_train.errors import InterruptedRunError, NonFiniteLossError
from student_train.model.adapters import add_adapters, count_trained, with_trained_adapters
from student_train.model.attention import prepare_attention
from student_train.model.flops import FlopFormula
from student_train.model.forward import SUMS, StudentWithLoss
from student_train.model.live_teacher import LiveTeacher
from student_train.model.load import (
    check_student,
    compile_layers,
    head_of,
    load_model,
    output_layer,
    student_fingerprint,
)
from student_train.model.save import make_savable, save_student
from student_train.run.checkpoint import (
    Progress,
    read_progress,
    read_state,
    restore_random_state,
    write_checkpoint,
)
from student_train.run.config import TrainConfig
from student_train.run.folder import RunFolder, RunIdentity
from student_train.run.memory import PeakMemory, advice_when_out_of_memory
from student_train.run.model_card import model_card
from student_train.run.optimizers import make_optimizer, make_schedule
from student_train.run.progress import TrainingProgress
from student_train.run.sharding import (
    clip_gradients,
    gathered_state,
    gathered_weights,
    place,
    restore_state,
    restore_weights,
    without_exchange,
)
from student_train.run.stopping import stop_signals
from student_train.run.validation import Validation, check_positions, heldout_data, num_trained_too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    model: Path  # Hugging Face folder
    num_steps: int
    metrics: dict[str, Any]  # of the last step
    was_finished: bool  # before this call


def train(config: TrainConfig) -> TrainResult:
    """Train a student on a cache; go on where the run's folder holds a checkpoint.

    Args:
        config: The run.

    Returns:
        Where the student is, and the last step's metrics.

    Raises:
        CacheError: If the cache cannot be read, or does not fit the student.
        ValueError: If the settings do not fit the cache, the student, or the run's folder.
        NonFiniteLossError: If the loss diverges; the last checkpoint stays.
        InterruptedRunError: After SIGINT or SIGTERM, when a checkpoint has been written.
    """
    # --- what is trained on what -------------------------------------------------------------
    run = RunFolder(config.out)
    if importlib.util.find_spec(config.tracker) is None and config.tracker != "none":
        raise ValueError(f"tracker: {config.tracker} is not installed; pip install it")
    accelerator = Accelerator(
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.out, logging_dir=config.out),
    )
    memory = PeakMemory(accelerator.device)
    data = open_data(
        config.cache,
        weights=config.cache_weights,
        where=config.where,
        heldout_share=config.heldout_share,
        top_k=config.top_k,
        mass=config.mass,
        allow_unsealed=config.allow_unsealed,
        snapshots=run.snapshots,
        prefix_cache=config.kept_prefixes,
    )
    model, tokenizer = load_model(
        config.student, revision=config.student_revision, dtype=torch.float32
    )
    for source in data.sources:
        check_student(config.student, model, tokenizer, source.cache.header)
    make_savable(config.student, model)
    check_selection(data, config.selection, model)
    heldout = heldout_data(config, data)
    if heldout is not None:
        for source in heldout.sources:
            check_student(config.student, model, tokenizer, source.cache.header)
        check_positions(heldout, model)
    identity = RunIdentity(
        config,
        data.fingerprint,
        student_fingerprint(model),
        None if heldout is None else heldout.fingerprint,
        data.snapshots,
    )
    run.check_identity(identity)
    if run.finished:
        metrics = run.last_metrics()
        return TrainResult(run.model, metrics["step"], metrics, was_finished=True)

    all_infos = [info for source in data.sources for info in source.train_infos()]
    cot_share = config.selection.cot_share(all_infos)
    if accelerator.is_main_process:
        logger.info("%s", data.summary)
        logger.info("%s: %.1f %% of the chains of thought", config.selection, 100 * cot_share)
        num_known = 0 if heldout is None else num_trained_too(heldout, data)
        if num_known:
            logger.warning("%d held-out traces are trained on too", num_known)

    # --- student, optimizer, schedule --------------------------------------------------------
    set_seed(config.seed, device_specific=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    steps_per_epoch = -(-data.num_traces // config.batch_traces)
    num_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    num_steps = int(num_steps)
    head = head_of(model)
    packing = config.packs_on(accelerator.device.type)
    layout = prepare_attention(
        model, config.attention, packing=packing, half_precision=config.dtype == "bfloat16"
    )
    if packing and layout == "alone" and accelerator.is_main_process:
        logger.info("%s would mix traces in one row: each gets its own", type(model).__name__)
    if config.lora is not None:
        add_adapters(model, config.lora)
        if accelerator.is_main_process:
            logger.info("%s of %s weights are trained", *map("{:,}".format, count_trained(model)))
    if config.compile:
        compile_layers(model)
    formula = FlopFormula.of(model)  # before its parameters are split
    with_loss = StudentWithLoss(model, head, config.ce_weight)
    with advice_when_out_of_memory(config):
        student = place(with_loss, accelerator, config.sharding)
    # Neither is prepared by accelerate, which would advance the schedule once per rank.
    optimizer = make_optimizer(
        config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay
    )
    scheduler = make_schedule(config.schedule, optimizer, warmup=config.warmup, num_steps=num_steps)
    student.train()
    validation = None
    if heldout is not None:
        validation = Validation(with_loss, heldout, accelerator, limit=config.heldout_traces)
    num_ids = output_layer(model).weight.shape[0]
    teacher = None
    if config.live_teacher is not None:
        teacher = LiveTeacher(
            config.live_teacher,
            [s.cache.header for s in data.sources],
            accelerator.device,
            num_ids=num_ids,
        )

    # --- go on from a checkpoint, if there is one --------------------------------------------
    progress = Progress()
    checkpoint = run.latest_checkpoint
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        state = read_state(checkpoint)
        restore_state(model, optimizer, state)
        scheduler.load_state_dict(state["scheduler"])
        del state  # which is mapped from a file that will be removed
        restore_random_state(checkpoint, accelerator.process_index)
        if accelerator.is_main_process:
            logger.info("going on after step %s of %s", f"{progress.step:,}", f"{num_steps:,}")
    accelerator.wait_for_everyone()  # nobody may look for a checkpoint any more
    if accelerator.is_main_process:
        run.begin(identity, progress.metrics_bytes)
    accelerator.wait_for_everyone()
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "leadspan",
        init_kwargs=_tracker_settings(config, progress),
    )

    def save() -> None:
        state = {**gathered_state(model, optimizer), "scheduler": scheduler.state_dict()}
        write_checkpoint(run, progress, state, accelerator, keep_last=config.keep_last)

    # --- the loop ----------------------------------------------------------------------------
    stream = TraceStream(
        data,
        config.selection,
        batch_traces=config.batch_traces,
        num_epochs=config.epochs if progress.step < num_steps else 0,
        seed=config.seed,
        num_lanes=config.shuffle_lanes,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        cursor=progress.cursor,
    )
    bytes_before = progress.bytes_read
    shown = TrainingProgress(num_steps, progress.step, enabled=accelerator.is_main_process)
    with stop_signals() as stop, shown, stream, advice_when_out_of_memory(config):
        logged_s, logged_wait_s, logged_tokens = time.perf_counter(), 0.0, 0
        step_began_s = logged_s
        for item in stream:
            progress = replace(progress, step=progress.step + 1, cursor=item.cursor)

            # Every rank must know the step's normaliser before its first backward, and must run
            # as many forwards as the others.
            mask = LossDropout(config.loss_dropout, config.seed, item.epoch)
            batches = micro_batches(
                item.traces,
                config.selection,
                batch_tokens=config.batch_tokens,
                loss_reduction=config.loss_reduction,
                mask=mask if mask.share else None,
                layout=layout,
                num_ids=num_ids,
            )
            num_valid, num_traces, num_absent, num_batches = _global_counts(accelerator, batches)
            num_empty_traces = len(item.trace_ids) - num_traces
            progress = replace(
                progress,
                num_absent=progress.num_absent + num_absent,
                num_empty_traces=progress.num_empty_traces + num_empty_traces,
            )
            if num_valid == 0:
                progress = replace(progress, num_empty_steps=progress.num_empty_steps + 1)
            divisor = max(1, normaliser(num_valid, num_traces, config.loss_reduction))

            sums = torch.zeros(1 + len(SUMS), dtype=torch.float64, device=accelerator.device)
            for index in range(num_batches if num_valid else 0):
                batch = batches[index] if index < len(batches) else empty_micro_batch()
                batch = batch.to(accelerator.device)
                if teacher is not None:
                    batch = teacher.taught(batch)
                is_last = index == num_batches - 1
                with without_exchange(student, accelerator, is_last=is_last):
                    loss, parts = student(batch)
                    # Ranks average their gradients; the loss is one sum over all of them.
                    accelerator.backward(loss * (accelerator.num_processes / divisor))
                sums += torch.cat([loss.detach().double()[None] / divisor, parts.double()])
            grad_norm = clip_gradients(student.parameters(), config.clip_norm)

            flops = sum(formula.flops(b.num_positions, b.num_valid) for b in batches)
            totals = accelerator.reduce(
                torch.cat([sums, sums.new_tensor([flops, item.bytes_read, stop.received or 0])]),
                "sum",
            ).tolist()
            metrics = dict(zip(("loss", *SUMS), totals, strict=False))
            if num_valid and not math.isfinite(metrics["loss"] + grad_norm):
                raise NonFiniteLossError(_non_finite(progress.step, metrics, grad_norm, item))
            progress = replace(
                progress,
                bytes_read=bytes_before + int(totals[-2]),
                num_tokens=progress.num_tokens + num_valid,
                flops=progress.flops + int(totals[-3]),
            )

            lr = float(scheduler.get_last_lr()[0])  # torchao has it in a tensor
            optimizer.step()  # moves nothing where no token gave a gradient
            scheduler.step()
            optimizer.zero_grad()

            now_s = time.perf_counter()
            progress = replace(progress, train_s=progress.train_s + now_s - step_began_s)
            logged_tokens += num_valid
            is_end = progress.step == num_steps

            figures: dict[str, float] = {}
            is_turn = config.eval_every is not None and progress.step % config.eval_every == 0
            if validation is not None and (is_end or is_turn):
                figures = validation.measure()
                if figures["heldout_kl"] < progress.best_kl:
                    progress = replace(
                        progress, best_step=progress.step, best_kl=figures["heldout_kl"]
                    )
            is_best = config.select == "heldout" and progress.best_step == progress.step

            if progress.step % config.log_every == 0 or is_end or figures:
                elapsed_s, waited_s = now_s - logged_s, stream.wait_s - logged_wait_s
                metrics = {
                    "step": progress.step,
                    "epoch": progress.step / steps_per_epoch,
                    "loss": metrics["loss"],
                    **{name: metrics[name] / max(1, num_valid) for name in SUMS},
                    "grad_norm": grad_norm,
                    "lr": lr,
                    "tokens": num_valid,
                    "num_empty_steps": progress.num_empty_steps,
                    "num_empty_traces": progress.num_empty_traces,
                    "num_absent_entries": progress.num_absent,
                    "tokens_trained": progress.num_tokens,
                    "bytes_read": progress.bytes_read,
                    "flops": progress.flops,
                    "peak_memory_bytes": memory.peak_bytes,
                    "train_s": progress.train_s,
                    "tokens_per_s": logged_tokens / elapsed_s,
                    "data_wait_share": waited_s / elapsed_s,
                    "cot_share": cot_share,
                    **figures,
                }
                logged_s, logged_wait_s, logged_tokens = time.perf_counter(), stream.wait_s, 0
                if accelerator.is_main_process:
                    run.append_metrics(metrics)
                accelerator.log(
                    {k: v for k, v in metrics.items() if k != "step"}, step=progress.step
                )
                shown.update(metrics)

            is_asked_to_stop = totals[-1] > 0
            is_turn = progress.step % config.save_every == 0
            if is_end or is_asked_to_stop or is_best or is_turn:
                save()
            if is_asked_to_stop and not is_end:
                raise InterruptedRunError(
                    f"stopped after step {progress.step:,} of {num_steps:,}; a checkpoint is in "
                    f"{run.checkpoints}. Run the same command again to go on.",
                    stop.received or signal.SIGTERM,
                )
            if is_end:
                break
            step_began_s = time.perf_counter()

    # --- the student -------------------------------------------------------------------------
    metrics = run.last_metrics()
    of_student = metrics
    if config.select == "heldout" and progress.best_step != num_steps:
        restore_weights(model, read_state(run.checkpoint_of(progress.best_step))["student"])
        of_student = run.metrics_of(progress.best_step)
        if accelerator.is_main_process:
            logger.info(
                "the student after step %d is taken, with a held-out KL of %.4f",
                progress.best_step,
                progress.best_kl,
            )
    weights = gathered_weights(model)  # of adapters, where only they were trained
    if accelerator.is_main_process:
        _check_weights(weights)
        if progress.num_absent:
            logger.warning(
                "%s kept entries had ids that the student lacks; their mass was in the tail",
                f"{progress.num_absent:,}",
            )
        if progress.num_empty_traces:
            logger.warning(
                "%s times a trace had no valid token and taught nothing; %d of %d steps had only "
                "such traces and changed nothing",
                f"{progress.num_empty_traces:,}",
                progress.num_empty_steps,
                num_steps,
            )
        if config.lora is not None:
            model, _ = load_model(
                config.student, revision=config.student_revision, dtype=torch.float32
            )
            make_savable(config.student, model)
            is_merged = config.lora_output == "merged"
            model = with_trained_adapters(model, config.lora, weights, merged=is_merged)
            weights = model.state_dict()
        save_student(
            model,
            tokenizer,
            run.model,
            weights=weights,
            terminal_token_ids=data.terminal_token_ids,
            card=model_card(config, data, of_student, num_steps),
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()  # and its processes' group
    return TrainResult(run.model, num_steps, metrics, was_finished=False)


def check_selection(data: TrainingData, selection: TokenSelection, model: PreTrainedModel) -> None:
    """Refuse a selection that leaves nothing of a cache, or traces that the student cannot hold.

    Raises:
        ValueError: Saying what to change.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for source in data.sources:
        path, header = source.cache.path, source.cache.header
        infos = source.train_infos()
        captured = tuple(
            name for name in selection.sections if name != "prompt" or header.capture_prompt
        )
        if not captured or not replace(selection, sections=captured).selects_any(infos):
            without = "" if header.capture_prompt else " (it has no prompt distributions)"
            raise ValueError(
                f"{path}: nothing to train on: {selection} selects no token that has a "
                f"distribution in any of {len(infos):,} traces{without}"
            )
        longest = max(infos, key=selection.num_read)
        if limit is not None and selection.num_read(longest) - 1 > limit:
            raise ValueError(
                f"{path}: {selection.num_read(longest):,} tokens of trace {longest.trace_id!r} "
                f"are selected, the student has {limit:,} positions; use --trace-tokens "
                f"{limit + 1} or a smaller lead span"
            )


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse to write a student that the last step broke: no later loss would show it.

    Raises:
        NonFiniteLossError: Naming the first weight that is no finite number.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise NonFiniteLossError(
                f"the last step left {name} without finite numbers, so no student is written. "
                "Lower --lr and begin again in another --out."
            )


def _global_counts(
    accelerator: Accelerator, batches: list[MicroBatch]
) -> tuple[int, int, int, int]:
    """Valid tokens, traces and absent entries of all ranks; the most micro-batches of one."""
    counts = [(b.num_valid, b.num_traces, b.num_absent, 1) for b in batches]
    local = torch.tensor(counts, dtype=torch.int64, device=accelerator.device).reshape(-1, 4)
    counts_R4 = accelerator.gather(local.sum(dim=0, keepdim=True))
    num_valid, num_traces, num_absent, _ = counts_R4.sum(dim=0).tolist()
    return num_valid, num_traces, num_absent, int(counts_R4[:, 3].max())


def _tracker_settings(config: TrainConfig, progress: Progress) -> dict[str, dict[str, Any]]:
    """What makes a tracker go on with a run instead of beginning another."""
    name = hashlib.sha256(str(config.out.resolve()).encode()).hexdigest()[:16]
    return {
        "tensorboard": {"purge_step": progress.step + 1},
        "wandb": {
            "id": name, "name": config.out.name, "resume": "allow", "dir": str(config.out),
            "config": config.to_json(),
        },
    }  # fmt: skip


def _non_finite(step: int, metrics: dict[str, float], grad_norm: float, item: StreamStep) -> str:
    return (
        f"step {step}: the loss is {metrics['loss']} and its gradient's norm {grad_norm}; "
        f"expected numbers. Its traces: {', '.join(item.trace_ids)}. Lower --lr, or look at these "
        "traces with cache-teacher inspect."
    )
