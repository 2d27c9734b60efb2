"""`train-student view`: a student's probabilities beside the teacher's, for some traces.

Letters: N tokens of a trace that have a distribution, K entries of the widest, E of all.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import check_student, head_of, load_model, output_layer
from student_train.model.tokens import add_missing_tokens
from student_train.run.folder import student_of
from student_train.view.config import StudentViewConfig
from teacher_cache.format import Trace, open_cache
from teacher_cache.format.files import publish
from teacher_cache.pages.choice import NUM_SHOWN, choose
from teacher_cache.pages.packing import StudentView
from teacher_cache.pages.traces import ShownTrace, trace_page


def write_view(config: StudentViewConfig) -> int:
    """Measure the student on the traces and write the page; returns its size in bytes.

    Raises:
        CacheError: If a trace is not there, a shard is damaged, or the student does not fit.
        ValueError: If the student cannot be loaded, or the cache holds no trace.
    """
    cache = open_cache(config.cache, allow_unsealed=True)
    chosen = choose(cache, config.trace, config.sample or NUM_SHOWN)
    name = student_of(config.student)
    model, tokenizer = load_model(name, dtype=torch.float32)
    add_missing_tokens(name, tokenizer, cache.header)
    check_student(name, model, tokenizer, cache.header)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = StudentWithLoss(model, head_of(model)).to(device).eval()

    def text_of(token_id: int) -> str:
        return str(tokenizer.decode([token_id]))

    views = [student_view(student, trace, device) for trace in chosen.traces]
    if not cache.header.has_tails:  # the page says so
        views = [
            replace(view, kl=kl_of_entries(trace, view.entry_logprobs))
            for trace, view in zip(chosen.traces, views, strict=True)
        ]
    shown = [ShownTrace(*both) for both in zip(chosen.traces, views, strict=True)]
    page = trace_page(cache, shown, text_of, chosen=chosen.words, student=config.student)
    publish(config.out, page)
    return len(page)


def student_view(student: StudentWithLoss, trace: Trace, device: torch.device) -> StudentView:
    """One forward pass over a trace, as far as the cache holds it."""
    num_ids = output_layer(student.model).weight.shape[0]
    view = StudentView(
        kl=np.full(len(trace), np.nan),
        tail_logprob=np.full(len(trace), np.nan),
        entry_logprobs=np.full(trace.num_entries, -np.inf),
    )
    batches = micro_batches(
        TokenSelection().selected([trace]), batch_tokens=1, loss_reduction="token", num_ids=num_ids
    )
    if not batches:  # no token has a distribution
        return view
    batch = batches[0].to(device)
    token_N = (batch.hidden_index + 1).cpu().numpy()
    k_N = trace.k[token_N].astype(np.int64)
    column_K = np.arange(k_N.max())
    is_own_NK = column_K < k_N[:, None]
    # Padding points at the row's first entry, which exists.
    entry_NK = trace.entry_offsets[token_N][:, None] + np.where(is_own_NK, column_K, 0)
    ids_NK = trace.top_ids[entry_NK].astype(np.int64)
    is_kept_NK = is_own_NK & (ids_NK < num_ids)  # the student has no row for the others
    result, logprobs_NJ = student.per_token_and_outcomes(
        batch,
        torch.from_numpy(np.minimum(ids_NK, num_ids - 1)).to(device),
        torch.from_numpy(is_kept_NK).to(device),
    )
    logprobs = logprobs_NJ.double().cpu().numpy()
    view.kl[token_N] = result.kl.double().cpu().numpy()
    view.tail_logprob[token_N] = logprobs[:, -1]
    view.entry_logprobs[entry_NK[is_kept_NK]] = logprobs[:, :-1][is_kept_NK]
    return view


def kl_of_entries(trace: Trace, entry_logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """[m] KL(teacher || student) over the kept entries alone, nats; NaN without a distribution.

    Args:
        trace: The trace.
        entry_logprobs: [E] the student's; entries that it has no row for are -inf and left out.
    """
    is_kept = np.isfinite(entry_logprobs)
    token = trace.token_of_entry[is_kept]

    def normalised(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = logprobs - np.log(np.bincount(token, np.exp(logprobs))[token])
        return found

    p, q = normalised(trace.top_logprobs[is_kept]), normalised(entry_logprobs[is_kept])
    kl = np.full(len(trace), np.nan)
    with_entries = np.unique(token)
    kl[with_entries] = np.bincount(token, np.exp(p) * (p - q))[with_entries]
    return kl
