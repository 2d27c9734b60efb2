"""A survey of a capture's input: what there is to do, and what is left of it.

Of a million requests, so in columns: as Python objects they took 8 s and half a GB.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    rejects = found.rejects
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
            job.source.path, pc.count_distinct(found.table["trace_id"]).as_py(),
        )  # fmt: skip
    if job.source.only_ids is not None:
        job.source.say_missing_ids({*found.table["trace_id"].to_pylist()} | rejects.ids)
    rejects.publish(open_store(job.out), job.file_name("rejects", "jsonl"))
    return survey


def _counted(job: Job, found: SurveyTable, finished: Mapping[str, str]) -> Survey:
    table = found.table
    is_known = _known(job, table, finished)
    is_taken = np.ones(table.num_rows, np.bool_)
    is_taken[job.limit :] = job.limit is None
    is_ours = np.ones(table.num_rows, np.bool_)
    if job.part is not None:
        is_ours[:] = [job.part.holds(name) for name in table["trace_id"].to_pylist()]
    rows = table["row"].to_numpy()
    left = np.zeros(found.num_rows, np.bool_)  # whether a request of the row is missing
    left[rows[~is_known | ~is_taken]] = True
    return Survey(
        num_wanted=int(is_ours.sum()),
        num_taken=int((is_ours & is_taken).sum()),
        num_missing=int((is_ours & is_taken & ~is_known).sum()),
        longest=int(table["longest"].to_numpy()[is_ours].max(initial=0)),
        num_rejected=found.rejects.total,
        num_input=int(is_taken.sum()),
        input_hash=_hash_of(table.filter(pa.array(is_taken))),
        done=~left,
        num_done=int((~left[rows]).sum()),
    )


def _known(job: Job, table: pa.Table, finished: Mapping[str, str]) -> NDArray[np.bool_]:
    """[requests] Whether a request's trace is in the cache, made from the same content."""
    names = pa.array(finished.keys(), pa.string())
    position = pc.index_in(table["request_id"], names)
    hashes = pa.array(finished.values(), pa.string()).take(position)
    changed = pc.not_equal(hashes, table["source_hash"])  # null where the trace is missing
    first = pc.index(changed, True).as_py()
    if first >= 0:
        raise SourceError(
            f"{job.source.path}: trace {table['request_id'][first].as_py()!r} is already in "
            f"{shown(job.out)}, made from other content. Give the changed row a new id, or write "
            "to another folder."
        )
    is_known: NDArray[np.bool_] = position.is_valid().to_numpy()
    return is_known


def _hash_of(requests: pa.Table) -> str:
    """Hash of the input as the requests tell it, the same for all workers that share it."""
    digest = hashlib.sha256()
    lines = pc.binary_join_element_wise(requests["request_id"], requests["source_hash"], "", "\n")
    for chunk in lines.chunks:
        digest.update("".join(chunk.to_pylist()).encode())
    return digest.hexdigest()[:32]
