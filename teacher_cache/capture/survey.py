"""A survey of a capture's input: what there is to do, and what is left of it."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.capture.job import Job
from teacher_cache.capture.survey_table import SurveyTable, survey_table
from teacher_cache.format import open_store, shown
from teacher_cache.sources import SourceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """The input's work for this worker, and how much of it is left."""

    num_wanted: int  # traces, ignoring the limit
    num_taken: int  # under the limit
    num_missing: int  # of these, not yet in the cache
    longest: int  # tokens that the engine must have room for
    num_rejected: int  # rows of the input that cannot be used
    num_input: int  # traces under the limit, of all workers together
    input_hash: str  # of these
    done: NDArray[np.bool_]  # [rows of the input] whether nothing is left to do for it
    num_done: int  # requests of these rows


def take_survey(job: Job, finished: Mapping[str, str]) -> Survey:
    """See what the input holds; every row is rendered once, or was at an earlier start.

    Args:
        job: Job with the input and the cache.
        finished: trace_id -> source_hash of traces in the cache.

    Raises:
        SourceError: If the input has nothing usable, a bad row under `strict`, or a
            finished trace whose row has changed since.
    """
    found = survey_table(job, may_resume=bool(finished))
    rejects, ids = found.rejects, set(found.table["trace_id"].to_pylist())
    if found.passed_over:
        logger.info(
            "%s: left as fields of the traces: %s; --prompt-field names the column of the prompt",
            job.source.path, ", ".join(found.passed_over),
        )  # fmt: skip
    survey = _counted(job, found, finished)
    if survey.num_input == 0:
        raise SourceError(
            f"{job.source.path}: expected at least one usable row, found none"
            + (f" ({rejects.most_frequent()})" if rejects.total else "")
        )
    if not found.table["has_thought"].to_numpy().any():
        logger.warning(
            "%s: none of its %d traces has a chain of thought; if they should, run "
            "cache-teacher preview on them",
            job.source.path, len(ids),
        )  # fmt: skip
    job.source.say_missing_ids(ids | rejects.ids)
    rejects.publish(open_store(job.out), job.file_name("rejects", "jsonl"))
    return survey


def _counted(job: Job, found: SurveyTable, finished: Mapping[str, str]) -> Survey:
    num_wanted = num_taken = num_missing = num_input = longest = 0
    digest = hashlib.sha256()
    left = np.zeros(found.num_rows, np.bool_)  # whether a request of the row is missing
    columns = [
        found.table[name].to_pylist()
        for name in ("row", "trace_id", "request_id", "source_hash", "longest")
    ]
    for row, trace_id, request_id, source_hash, num_tokens in zip(*columns, strict=True):
        known = finished.get(request_id)
        if known is not None and known != source_hash:
            raise SourceError(
                f"{job.source.path}: trace {request_id!r} is already in {shown(job.out)}, "
                "made from other content. Give the changed row a new id, or write to another "
                "folder."
            )
        is_taken = job.limit is None or num_input < job.limit
        if is_taken:
            num_input += 1
            digest.update(f"{request_id}\n{source_hash}\n".encode())
        if known is None or not is_taken:
            left[row] = True
        if job.part is None or job.part.holds(trace_id):
            num_wanted += 1
            num_taken += is_taken
            num_missing += is_taken and known is None
            longest = max(longest, num_tokens)
    rows = found.table["row"].to_numpy()
    return Survey(
        num_wanted, num_taken, num_missing, longest, found.rejects.total, num_input,
        digest.hexdigest()[:32], ~left, int((~left[rows]).sum()),
    )  # fmt: skip
