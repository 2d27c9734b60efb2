"""A narrower view of a trace, as a capture with fewer kept entries would have stored it.

Letters: m tokens, E kept entries.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.codec import KeepPolicy, tail_logit_of
from teacher_cache.format.trace import Trace


def narrowed(trace: Trace, policy: KeepPolicy) -> Trace:
    """Keep fewer entries of every token; the probability of the others joins the tail.

    The ids and logits are those of a capture with this policy. Its tail was summed before the
    logits were rounded, and so differs from this one's by the rounding of what is dropped here.

    Args:
        trace: Trace captured with a policy that keeps at least as much.
        policy: The fewest most probable entries whose mass reaches `mass`, at most `top_k`, and
            the target token. The mass is a sum of stored probabilities, which are rounded:
            to limit only the number of entries, pass a mass of 1.
    """
    probs, token_of_entry = np.exp(trace.top_logprobs), trace.token_of_entry
    starts = trace.entry_offsets[token_of_entry]
    before = np.concatenate([[0.0], np.cumsum(probs)])
    mass_before = before[:-1] - before[starts]
    is_kept = mass_before < policy.enough
    is_kept &= np.arange(len(probs)) - starts < policy.top_k
    is_kept |= trace.top_ids == trace.token_ids[token_of_entry]

    num_tokens = len(trace.k)
    k = np.bincount(token_of_entry[is_kept], minlength=num_tokens).astype(np.uint8)
    kept_mass: NDArray[np.float64] = np.bincount(
        token_of_entry, weights=probs * is_kept, minlength=num_tokens
    ).astype(np.float64)
    return replace(
        trace,
        k=k,
        top_ids=trace.top_ids[is_kept],
        top_logits=trace.top_logits[is_kept],
        tail_logit=np.where(k < trace.k, tail_logit_of(kept_mass), trace.tail_logit),
    )
