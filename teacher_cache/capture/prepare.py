"""Code shared by both captures: from configuration to job, run on one engine or on Ray."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from teacher_cache.capture.configs import CaptureConfig, GenerateConfig, RowsConfig, ScoreConfig
from teacher_cache.capture.job import Job
from teacher_cache.capture.ray_driver import Cluster, ReplicaPlan
from teacher_cache.capture.replica_gpus import parallel_args, replica_gpus
from teacher_cache.capture.run import CaptureReport, capture
from teacher_cache.engines import Sampling, Teacher, TeacherFacts, TeacherRequest
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.engines.start import start_teacher
from teacher_cache.format import CacheHeader, parse_worker, shown
from teacher_cache.sources import Input, InputTraces, Render, RowColumns, SourceTrace, read_ids
from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.sources.turn_layout import GivenMarks, layout_lines
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger(__name__)


def run_job(config: CaptureConfig, job: Job) -> CaptureReport:
    """Run a job on one engine in this process, or on replicas that Ray places."""
    if not config.on_cluster:
        return capture(job)
    gpus = replica_gpus(parallel_args(config.tensor_parallel_size, config.engine_arg))
    placement = ReplicaPlan(config.num_replicas, config.ray_address, gpus)
    return capture(job, partial(Cluster, placement))


def input_rows(config: RowsConfig, path: Path) -> Input:
    """The rows of a capture."""
    return Input(path, config.dataset_config, config.split)


def row_columns(config: RowsConfig) -> RowColumns:
    """Meaning of a row's columns: the options of these names that the command has."""
    names = (item.name for item in fields(RowColumns))
    return RowColumns(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def model_files(config: RowsConfig) -> ModelFiles:
    """The teacher's files named by the user."""
    return ModelFiles(config.model, config.revision, config.trust_remote_code)


def teacher_tokenizer(config: RowsConfig, files: ModelFiles) -> TeacherTokenizer:
    """The teacher's tokenizer, with the user's marks and template arguments."""
    with Progress("loading the tokenizer"):
        return TeacherTokenizer(files, config.template_arg, _given_marks(config))


def _given_marks(config: RowsConfig) -> GivenMarks | None:
    if config.think_open is None or config.think_close is None:
        return None
    opener, joint = (m.replace("\\n", "\n") for m in (config.think_open, config.think_close))
    return GivenMarks(opener, joint)


def prepare_job(
    config: GenerateConfig | ScoreConfig,
    files: ModelFiles,
    tokenizer: TeacherTokenizer,
    path: Path,
    render: Render,
    requests: Callable[[SourceTrace], list[TeacherRequest]],
    sampling: Sampling | None,
    recorded: Mapping[str, float | int | None] | None,
    rollout: Mapping[str, Any] | None = None,
) -> Job:
    """Everything that a capture needs, whether it generates or scores."""
    worker, part = parse_worker(config.worker)
    if config.on_cluster:
        worker = "ray"  # the driver's name; the actors have their own
    with Progress("trying the chat template"):
        layout = tokenizer.layout()
    for line in layout_lines(layout):
        logger.info("%s", line)
    marks = layout.marks or ThinkMarks("", "")

    def header(facts: TeacherFacts) -> CacheHeader:
        return CacheHeader(
            mode="score" if sampling is None else "generate",
            teacher=files.name,
            teacher_revision=config.revision,
            teacher_fingerprint=files.weights_fingerprint(),
            engine=facts.engine,
            engine_version=facts.engine_version,
            dtype=facts.dtype,
            head_dtype=facts.head_dtype,
            vocab_size=facts.vocab_size,
            tokenizer_size=tokenizer.size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            chat_template_hash=tokenizer.template_hash,
            think_open_ids=tuple(tokenizer.encode(marks.open)),
            think_close_ids=tuple(tokenizer.encode(marks.close)),
            terminal_token_ids=tokenizer.terminal_ids,
            sampling=recorded,
            top_k=config.top_k,
            mass=config.mass,
            capture_prompt=config.capture_prompt,
            num_bands=config.num_bands,
            max_lead_span=config.lead_span,
            teacher_settings=facts.settings or None,
            chat_template=tokenizer.template.text,
            chat_template_args=tokenizer.template.arguments or None,
            special_tokens=tokenizer.special_tokens or None,
            added_tokens=tokenizer.added_tokens or None,
            turn_layout=layout.to_json(),
            rollout=rollout,
        )

    return Job(
        out=config.out,
        journal=config.journal,
        worker=worker,
        part=part,
        on_cluster=config.on_cluster,
        limit=config.limit,
        config=_resolved(config),
        source=InputTraces(
            input_rows(config, path),
            render,
            id_field=config.id_field,
            strict=config.strict,
            only_ids=None if config.ids_file is None else read_ids(config.ids_file),
            columns=row_columns(config) if sampling is None else None,
        ),
        tokenizer=tokenizer,
        requests=requests,
        header=header,
        start_teacher=partial(_start, config, files, sampling, _server(config, files, tokenizer)),
    )


def _resolved(config: CaptureConfig) -> dict[str, object]:
    """The configuration as JSON, without the credentials that a URI may contain."""
    url = None if config.url is None else shown(config.url)
    values = {**asdict(config), "out": shown(config.out), "url": url}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


_PROBE_TEXT = "The sum of 17 and 25 is 42: first 7 + 5 = 12, so write 2 and carry 1; then 1 + 2 + 1"


def _server(
    config: CaptureConfig, files: ModelFiles, tokenizer: TeacherTokenizer
) -> ServerSettings | None:
    if config.url is None:
        return None
    return ServerSettings(
        url=config.url,
        vocab_size=files.vocab_size(),
        probe_ids=tuple(tokenizer.encode_document(_PROBE_TEXT)),
        model=config.model,
        decode=tokenizer.decode,
        served_model=config.served_model,
        in_flight=config.in_flight,
        tolerance=config.server_tolerance,
    )


def _start(
    config: CaptureConfig,
    files: ModelFiles,
    sampling: Sampling | None,
    server: ServerSettings | None,
    longest: int,
    head_dtype: str = "float32",
) -> Teacher:
    return start_teacher(
        config.engine,
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        top_k=min(config.top_k, files.vocab_size()),  # a small vocabulary has no more candidates
        max_model_len=longest,
        sampling=sampling,
        engine_args=parallel_args(config.tensor_parallel_size, config.engine_arg),
        rows_from=config.rows_from,
        trust_remote_code=config.trust_remote_code,
        server=server,
        head_dtype=head_dtype,
    )
