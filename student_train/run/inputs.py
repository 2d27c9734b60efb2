"""Inputs of a run, opened and checked before anything is trained or written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.data.draw import DrawnSpans, SpanFigures, described, draw_spans
from student_train.data.tails import require_tails_to_train
from student_train.data.traces import TrainingData, open_data
from student_train.model.load import HeadScaling, check_student
from student_train.run.config import TrainConfig
from student_train.run.file_work import FileWork
from student_train.run.folder import RunFolder, RunIdentity
from student_train.run.memory import PeakMemory
from student_train.run.processes import decided_by_main
from student_train.run.rollouts import check_rollouts
from student_train.run.student import load_student
from student_train.run.teams import Teams, make_teams
from student_train.run.validation import check_positions, heldout_data, num_trained_too
from teacher_cache.format import CacheMismatchError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """A run's folder, its data and its student as they are before training."""

    config: TrainConfig
    drawn: tuple[DrawnSpans, ...]  # of each cache, which tokens of its traces are trained on
    folder: RunFolder
    identity: RunIdentity
    accelerator: Accelerator
    teams: Teams  # of processes that share every trace
    files: FileWork
    memory: PeakMemory
    data: TrainingData
    heldout: TrainingData | None
    model: PreTrainedModel  # float32, on the CPU; without weights but in the main process
    tokenizer: PreTrainedTokenizerBase
    head: HeadScaling


def open_inputs(config: TrainConfig, accelerator: Accelerator) -> RunInputs:
    """Open everything that a run needs, and refuse what does not fit; every process calls it.

    Raises:
        CacheError: If the cache cannot be read, or does not fit the student.
        DamagedFileError: If the run's configuration, or a student that an earlier run wrote, is
            damaged.
        ValueError: If the settings do not fit the cache, the student, or the run's folder.
    """
    folder = RunFolder(config.out)
    teams = make_teams(accelerator, config.context_parallel)
    memory = PeakMemory(accelerator.device)
    data = open_data(
        config.cache,
        weights=config.cache_weights,
        where=config.where,
        trace_fields=config.trace_fields,
        heldout_share=config.heldout_share,
        top_k=config.top_k,
        mass=config.mass,
        allow_unsealed=config.allow_unsealed,
        snapshots=folder.snapshots,
        prefix_cache=config.kept_prefixes,
    )
    if config.match == "chunks":
        _require_chunks(data)
    if config.tail != "renormalise" and config.ce_weight < 1:
        require_tails_to_train(data)
    decided_by_main(accelerator, lambda: check_rollouts(config, data))
    if config.chat_template == "cache":
        _require_one_template(data)
    heldout = heldout_data(config, data)
    headers = [source.cache.header for source in data.sources]
    student = load_student(config, headers, accelerator)
    model = student.model
    drawn = tuple(draw_spans(source, config.selection, config.seed) for source in data.sources)
    check_selection(drawn, model)
    if heldout is not None:
        for source in heldout.sources:
            check_student(config.student, model, student.tokenizer, source.cache.header)
        check_positions(heldout, model)
    identity = RunIdentity(
        config,
        data.fingerprint,
        student.fingerprint,
        None if heldout is None else heldout.fingerprint,
        data.snapshots,
    )
    folder.check_identity(identity)
    return RunInputs(
        config, drawn, folder, identity, accelerator, teams, FileWork(accelerator), memory,
        data, heldout, model, student.tokenizer, student.head,
    )  # fmt: skip


def _require_chunks(data: TrainingData) -> None:
    """Refuse caches without likelihoods of chunks.

    Raises:
        CacheMismatchError: If there is one.
    """
    for source in data.sources:
        if not source.cache.header.has_chunks:
            raise CacheMismatchError(
                f"{source.cache.path}: it holds no likelihoods of chunks, which --match chunks "
                "needs: those are of text that two tokenizers write. Give a cache made by "
                "`cache-teacher retokenize`, or leave --match out"
            )


def _require_one_template(data: TrainingData) -> None:
    """Refuse caches of different templates where the student is to get theirs.

    Raises:
        ValueError: If templates differ; it names two of the caches.
    """
    first, *others = data.sources
    for other in others:
        if other.cache.header.chat_template != first.cache.header.chat_template:
            raise ValueError(
                f"{first.cache.path} and {other.cache.path} were rendered with different chat "
                "templates: expected one for the student. Train on caches of one template, or "
                "keep the student's own with --chat-template student."
            )


def log_inputs(inputs: RunInputs, spans: SpanFigures) -> None:
    """Log the data that is trained on; the main process calls it."""
    logger.info("%s", inputs.data.summary)
    logger.info("%s", described(inputs.drawn, spans))
    num_known = 0 if inputs.heldout is None else num_trained_too(inputs.heldout, inputs.data)
    if num_known:
        logger.warning("%d held-out traces are trained on too", num_known)


def check_selection(drawn: Sequence[DrawnSpans], model: PreTrainedModel) -> None:
    """Refuse a selection that leaves nothing of a cache, or traces that the student cannot hold.

    Raises:
        ValueError: If there is one; it says what to change.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for one in drawn:
        path, header, selection = one.source.cache.path, one.source.cache.header, one.selection
        captured = tuple(
            name for name in selection.sections if name != "prompt" or header.capture_prompt
        )
        if not captured or not one.selects_any(captured):
            without = "" if header.capture_prompt else " (it has no prompt distributions)"
            raise ValueError(
                f"{path}: nothing to train on: {selection} selects no token that has a "
                f"distribution in any of {len(one.source.train):,} traces{without}"
            )
        longest = int(one.num_read.argmax())
        num_read = int(one.num_read[longest])
        if limit is not None and num_read - 1 > limit:
            trace_id = one.source.train_infos()[longest].trace_id
            raise ValueError(
                f"{path}: {num_read:,} tokens of trace {trace_id!r} are selected, the student has "
                f"{limit:,} positions; use --trace-tokens {limit + 1} or a smaller lead span"
            )
