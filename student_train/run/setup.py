"""Setup of a run from checked inputs, ready for its first step or the next after a stop."""

import logging
from dataclasses import dataclass

from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from student_train.batch.micro_batch import MicroBatch, micro_batches
from student_train.batch.prepared import PreparedStep, prepared
from student_train.data.draw import SpanFigures
from student_train.data.prefetch import Prefetch
from student_train.data.stream import TraceStream, num_steps, steps_per_epoch
from student_train.data.tokens import LossDropout, SelectedTrace
from student_train.model.adapters import add_adapters, count_trained
from student_train.model.attention import keeps_traces_apart, prepare_attention
from student_train.model.context_parallel import check_sharing, share_sequences
from student_train.model.flops import FlopFormula
from student_train.model.forward import StudentWithLoss
from student_train.model.live_teacher import LiveTeacher
from student_train.model.load import compile_layers, output_layer
from student_train.model.own_traces import OwnTraces
from student_train.run.checkpoint import (
    read_checkpoint,
    restore,
    restore_random_state,
    whole_checkpoint,
)
from student_train.run.inputs import RunInputs, log_inputs
from student_train.run.memory import advice_when_out_of_memory
from student_train.run.memory_estimate import estimate_line
from student_train.run.optimizers import make_optimizer, make_schedule
from student_train.run.precision import halve_frozen_layers
from student_train.run.processes import decided_by_main
from student_train.run.sharding import place
from student_train.run.state import RunState
from student_train.run.trackers import start_tracker
from student_train.run.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with; only `state` and torch's objects change."""

    inputs: RunInputs
    student: nn.Module  # in its place; its parameters are those of `inputs.model`
    optimizer: Optimizer
    scheduler: LRScheduler
    validation: Validation | None  # None without held-out traces
    teacher: LiveTeacher | None
    formula: FlopFormula
    layout: str  # how traces share rows; see `packing.LAYOUTS`
    num_ids: int  # that the student has a row for
    num_steps: int
    steps_per_epoch: int
    spans: SpanFigures
    state: RunState

    @property
    def is_over(self) -> bool:
        """Whether no step follows."""
        return self.state.is_over(self.num_steps, self.inputs.config.patience)


def prepare(inputs: RunInputs) -> Run:
    """Place the student, create its optimizer, and restore the last checkpoint if there is one.

    Every process calls it; the main one also makes the run's folder ready.

    Raises:
        CacheError: If the live teacher is not the cache's, or held-out traces cannot be read.
        DamagedFileError: If the run has checkpoints, and all of them are damaged.
        OutOfMemoryError: If the student does not fit the device.
        ValueError: If the settings do not fit the student.
    """
    config, accelerator, model = inputs.config, inputs.accelerator, inputs.model
    spans = SpanFigures.of(inputs.drawn)
    if accelerator.is_main_process:
        log_inputs(inputs, spans)
        if accelerator.device.type == "cuda":
            _log_estimate(inputs)

    set_seed(config.seed, device_specific=True)
    layout = _change_model(inputs)
    formula = FlopFormula.of(model)  # before its parameters are split
    with_loss = StudentWithLoss(
        model,
        inputs.head,
        config.objective,
        num_sources=len(inputs.data.sources),
        matched_chunks_at=config.matched_chunks_at,
        router_aux_loss_coef=config.router_aux_loss_coef,
        own_traces=OwnTraces(config.used_ratio_clip) if inputs.data.has_own_traces else None,
    )
    with_loss.train()  # in every process, or some would recompute layers while they are placed
    with advice_when_out_of_memory(config):
        student = place(with_loss, accelerator, config.sharding, offload=config.offload)
    # Neither is prepared by accelerate, which would advance the schedule once per rank.
    optimizer = make_optimizer(
        config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay
    )
    last_step = num_steps(
        inputs.data.num_traces, config.batch_traces, epochs=config.epochs, limit=config.max_steps
    )
    scheduler = make_schedule(config.schedule, optimizer, warmup=config.warmup, num_steps=last_step)
    validation = None
    if inputs.heldout is not None:
        validation = Validation(
            with_loss, inputs.heldout, accelerator, inputs.teams, limit=config.heldout_traces
        )
    num_ids = output_layer(model).weight.shape[0]
    teacher = None
    if config.live_teacher is not None:
        headers = [source.cache.header for source in inputs.data.sources]
        teacher = LiveTeacher(config.live_teacher, headers, accelerator.device, num_ids=num_ids)

    state = _restored(inputs, optimizer, scheduler, last_step)
    return Run(
        inputs=inputs,
        student=student,
        optimizer=optimizer,
        scheduler=scheduler,
        validation=validation,
        teacher=teacher,
        formula=formula,
        layout=layout,
        num_ids=num_ids,
        num_steps=last_step,
        steps_per_epoch=steps_per_epoch(inputs.data.num_traces, config.batch_traces),
        spans=spans,
        state=state,
    )


def _log_estimate(inputs: RunInputs) -> None:
    try:
        line = estimate_line(inputs.config, inputs.model.config, inputs.drawn)
    except ValueError as error:
        line = str(error)
    logger.info("memory: %s", line)


def open_stream(run: Run) -> Prefetch[PreparedStep]:
    """Start to read and prepare this process' part of every remaining global batch."""
    config, teams, device = run.inputs.config, run.inputs.teams, run.inputs.accelerator.device
    stream = TraceStream(
        run.inputs.data,
        config.selection,
        batch_traces=config.batch_traces,
        num_epochs=0 if run.is_over else config.epochs,
        seed=config.seed,
        rank=teams.team,
        num_ranks=teams.num_teams,
        exchange=teams.exchange,
        cursor=run.state.cursor,
        shuffle_window=config.shuffle_window,
    )

    def collate(traces: list[SelectedTrace], epoch: int) -> list[MicroBatch]:
        dropout = LossDropout(config.loss_dropout, config.seed, epoch)
        batches = micro_batches(
            traces,
            batch_tokens=config.batch_tokens,
            loss_reduction=config.loss_reduction,
            mask=dropout if dropout.share else None,
            layout=run.layout,
            num_ids=run.num_ids,
            teaching=config.teaching,
        )
        return [teams.part.of(batch) for batch in batches]

    return stream.prefetched(lambda step: prepared(step, collate, device))


def _change_model(inputs: RunInputs) -> str:
    """Set up checkpointing, attention, adapters and compilation in place; return the layout."""
    config, accelerator, model = inputs.config, inputs.accelerator, inputs.model
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = config.packs_on(accelerator.device.type)
    if inputs.teams.group is not None:
        may_pack = decided_by_main(
            accelerator, lambda: check_sharing(model, config.context_parallel)
        )
        can_pack = packing and may_pack
        share_sequences(model, inputs.teams.group)
        layout = "flat" if can_pack else "alone"
    else:
        can_pack = packing and decided_by_main(accelerator, lambda: keeps_traces_apart(model))
        layout = prepare_attention(
            model, config.attention, packing=can_pack, half_precision=config.dtype == "bfloat16"
        )
    if packing and not can_pack and accelerator.is_main_process:
        logger.info("%s would mix traces in one row: each trace gets its own", type(model).__name__)
    if config.lora is not None:
        add_adapters(model, config.lora)
        if config.dtype == "bfloat16":
            halve_frozen_layers(model)
        if accelerator.is_main_process:
            logger.info("%s of %s weights are trained", *map("{:,}".format, count_trained(model)))
    if config.compile:
        compile_layers(model)
    return layout


def _restored(
    inputs: RunInputs, optimizer: Optimizer, scheduler: LRScheduler, last_step: int
) -> RunState:
    """Restore everything from the last checkpoint, and make the folder ready to resume from it."""
    config, folder, accelerator = inputs.config, inputs.folder, inputs.accelerator
    path = decided_by_main(
        accelerator, lambda: whole_checkpoint(folder, needs_best=config.select == "heldout")
    )
    state, mark = (RunState(), None) if path is None else read_checkpoint(path)
    if path is not None:
        restore(path, inputs.model, optimizer, scheduler, inputs.files)
        restore_random_state(path, accelerator.process_index, seed=config.seed)
        if accelerator.is_main_process:
            logger.info("resuming after step %s of %s", f"{state.step:,}", f"{last_step:,}")
    num_warmup_steps = round(config.warmup * last_step)
    if folder.extends(config) and 0 < state.step < num_warmup_steps:
        raise ValueError(
            f"--epochs, --max-steps: {num_warmup_steps:,} of {last_step:,} steps would be warm-up, "
            f"and the rate has reached its peak in {state.step:,}: extend the run by less, or "
            "begin another"
        )
    if folder.finished and state.is_over(last_step, config.patience):
        raise ValueError(
            f"{folder.path}: the run is finished, and these settings leave no step after "
            f"{state.step:,}: raise --epochs, --max-steps or --patience, whichever ended it"
        )
    with inputs.files.shared():  # nobody may look for a checkpoint any more
        pass
    with inputs.files.shared():
        if accelerator.is_main_process:
            run_id = folder.begin(inputs.identity, mark)
            if config.tracker != "none":
                start_tracker(accelerator, config, run_id, state.step)
    return state
