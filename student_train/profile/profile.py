"""`train-student profile`: one forward pass of the untrained student over a cache's traces.

OUT/profile.json   tables by position, section and lead span, the advice, and the caches compared
OUT/profile.html   the same as a page
OUT/traces.jsonl   a line per trace, the most suitable first
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from student_train.data.tails import require_tails_to_train
from student_train.data.traces import TrainingData, open_data
from student_train.model.forward import StudentWithLoss
from student_train.model.load import check_student, head_of, load_model
from student_train.profile.advice import Advice
from student_train.profile.choice import chosen_places
from student_train.profile.config import ProfileConfig
from student_train.profile.figures import (
    Coverage,
    cache_row,
    position_rows,
    section_rows,
    trace_row,
)
from student_train.profile.measure import TraceMeasures, measured
from student_train.profile.page import profile_page
from student_train.run.precision import usual_dtype
from teacher_cache.format import shown
from teacher_cache.format.files import publish
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfileResult:
    """Result of a profile."""

    tables: dict[str, Any]  # content of profile.json
    advice: Advice


def profile(config: ProfileConfig) -> ProfileResult:
    """Measure a student on some traces and write the findings about lead spans.

    Raises:
        CacheError: If a cache cannot be read, or does not fit the student.
        ValueError: If the settings do not fit the caches or the student.
    """
    data = open_data(
        config.cache,
        where=config.where,
        trace_fields=config.trace_fields,
        heldout_share=config.heldout_share,
        allow_unsealed=config.allow_unsealed,
    )
    if config.tail != "renormalise":
        require_tails_to_train(data)
    with Progress("loading the student"):
        model, tokenizer = load_model(
            config.student, revision=config.student_revision, dtype=torch.float32
        )
        for source in data.sources:
            check_student(config.student, model, tokenizer, source.cache.header)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = StudentWithLoss(model, head_of(model), config.objective).to(device).eval()
    by_cache: list[list[TraceMeasures]] = []
    is_half = (config.dtype or usual_dtype()) == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
        for number in range(len(data.sources)):
            by_cache.append(_measured_cache(config, data, number, student, device))
    tables, advice = _tables(config, data, by_cache)
    _write(config.out, tables, advice, _trace_rows(data, by_cache))
    return ProfileResult(tables, advice)


def _measured_cache(
    config: ProfileConfig,
    data: TrainingData,
    number: int,
    student: StudentWithLoss,
    device: torch.device,
) -> list[TraceMeasures]:
    source = data.sources[number]
    cache = source.cache
    places = chosen_places(source, config.num_traces, config.seed)
    has_tails = cache.header.has_tails
    with Progress("measured", len(places), "traces") as progress:
        read = progress.counting(cache.read_held(places))
        measures = list(measured(student, read, device, number, has_tails=has_tails))
    if not measures:
        raise ValueError(
            f"{cache.path}: none of {len(places):,} traces has a token with a distribution"
        )
    logger.info(
        "%s: %s of %s traces, %s tokens with a distribution",
        cache.path, f"{len(measures):,}", f"{len(source.train):,}",
        f"{sum(len(one.token_N) for one in measures):,}",
    )  # fmt: skip
    if cache.header.is_truncated:
        logger.warning(
            "%s was truncated to %s: nothing is known about the rest, and shares are of the part "
            "that it holds",
            cache.path, cache.header.held_part,
        )  # fmt: skip
    return measures


def _tables(
    config: ProfileConfig, data: TrainingData, by_cache: list[list[TraceMeasures]]
) -> tuple[dict[str, Any], Advice]:
    measures = [one for own in by_cache for one in own]
    coverage = Coverage.of(measures, config.seed)
    advice = Advice.of(coverage, len(measures))
    caches = [
        {
            "cache": shown(path),
            "fingerprint": source.cache.fingerprint,
            "teacher": source.cache.header.teacher,
            **cache_row(own, config.seed),
        }
        for path, source, own in zip(config.cache, data.sources, by_cache, strict=True)
    ]
    tables = {
        "student": config.student,
        "divergence": config.divergence,
        "num_traces": len(measures),
        "positions": position_rows(measures),
        "sections": section_rows(measures),
        "divergence_before": coverage.to_json(),
        "advice": asdict(advice),
        "caches": sorted(caches, key=_suitability),
    }
    return tables, advice


def _trace_rows(data: TrainingData, by_cache: list[list[TraceMeasures]]) -> list[dict[str, Any]]:
    rows = [
        {
            "trace_id": one.trace_id,
            "cache_fingerprint": source.cache.fingerprint,
            **trace_row(one),
        }
        for source, own in zip(data.sources, by_cache, strict=True)
        for one in own
    ]
    return sorted(rows, key=_suitability)


def _suitability(row: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: the lowest rank-surprisal ratio first, missing ones last."""
    ratio = row["rank_surprisal_ratio"]
    return ratio is None, ratio or 0.0


def _write(
    out: Path, tables: dict[str, Any], advice: Advice, trace_rows: list[dict[str, Any]]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    publish(out / "profile.json", (json.dumps(tables, indent=1) + "\n").encode())
    lines = "".join(json.dumps(row) + "\n" for row in trace_rows)
    publish(out / "traces.jsonl", lines.encode())
    publish(out / "profile.html", profile_page(tables, advice))
