"""View of a trace for a student with fewer ids than its teacher.

Models pad their vocabularies to different widths, above the tokens that they share.
"""

from dataclasses import replace

import numpy as np

from teacher_cache.format import CacheMismatchError, Trace


def within_vocabulary(trace: Trace, num_ids: int) -> Trace:
    """Drop the kept ids from `num_ids` on; the teacher's mass there joins the tail.

    The tail's bucket stays exact: the student's mass on the dropped ids is 0. The other way
    round needs nothing: ids that only the student has belong to its own tail,
    and the teacher's tail has no mass for them.

    Args:
        trace: Trace as cached.
        num_ids: Number of the student's ids.

    Raises:
        CacheMismatchError: If a token of the trace itself is among them.
    """
    beyond = np.flatnonzero(trace.token_ids >= num_ids)
    if len(beyond):
        raise CacheMismatchError(
            f"trace {trace.trace_id!r}: its token {beyond[0]} has the id "
            f"{trace.token_ids[beyond[0]]:,}, the student has {num_ids:,} ids. Choose a student "
            "with more."
        )
    is_kept = trace.top_ids < num_ids
    if is_kept.all():
        return trace
    num_tokens = len(trace)
    token_of_entry, probs = trace.token_of_entry, np.exp(trace.top_logprobs)
    inside = np.bincount(token_of_entry, weights=probs * is_kept, minlength=num_tokens)
    dropped = np.bincount(token_of_entry, weights=probs * ~is_kept, minlength=num_tokens)
    changed = np.flatnonzero(dropped)
    tail_logit = trace.tail_logit.copy()
    tail = trace.tail[changed] + dropped[changed]
    tail_logit[changed] = np.log(tail) - np.log(inside[changed])

    token_of_entry, top_logits = token_of_entry[is_kept], trace.top_logits[is_kept]
    largest = np.full(num_tokens, -np.inf, np.float32)
    np.maximum.at(largest, token_of_entry, top_logits)
    return replace(
        trace,
        k=np.bincount(token_of_entry, minlength=num_tokens).astype(np.uint8),
        top_ids=trace.top_ids[is_kept],
        top_logits=top_logits - largest[token_of_entry],
        tail_logit=tail_logit,
    )
