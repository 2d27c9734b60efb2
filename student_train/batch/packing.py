"""Plan of which traces of a step share a forward pass, and in what layout. Numbers only.

A micro-batch is a list of rows, a row a list of traces, one after the other.
"""

import heapq
from collections.abc import Sequence

# alone:  every row is one trace, padded at its end. For models that would mix traces of a row.
# packed: short traces share rows. For attention that masks: its cost grows with the row squared.
# flat:   all traces are in one row. For attention that takes the lengths (FlashAttention, and
#         that of teams of processes).
LAYOUTS = ("alone", "packed", "flat")

MAX_PADDING = 0.05  # share of a micro-batch's positions
# A longer trace keeps a device busy by itself, and by itself it needs no mask.
MAX_PACKED_LENGTH = 1024

Rows = list[list[int]]


def plan_micro_batches(lengths: Sequence[int], batch_tokens: int, layout: str) -> list[Rows]:
    """Cut traces into micro-batches, the longest first.

    Where lengths within a step differ too much to share a rectangle, traces go into more and
    smaller micro-batches: padding is at most `MAX_PADDING` of each.

    Args:
        lengths: Length of each trace, at least 1.
        batch_tokens: Cap of rows times their width; a longer trace is a micro-batch by itself.
        layout: One of `LAYOUTS`.

    Returns:
        Micro-batches of rows of indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # stable
    if layout == "flat":
        return [[group] for group in _groups(order, lengths, batch_tokens)]
    num_alone = len(order)
    if layout == "packed":
        num_alone = sum(length > MAX_PACKED_LENGTH for length in lengths)
    alone, short = order[:num_alone], order[num_alone:]
    plan = [[[index] for index in group] for group in _even_groups(alone, lengths, batch_tokens)]
    num_filled = int((1 - MAX_PADDING) * batch_tokens)  # leaves rows room to be uneven
    plan += [_rows(group, lengths) for group in _groups(short, lengths, num_filled)]
    return plan


def _groups(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Rows:
    """Consecutive traces of at most `batch_tokens` together."""
    groups: Rows = []
    total = 0
    for index in order:
        total += lengths[index]
        if groups and total <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            total = lengths[index]
    return groups


def _even_groups(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Rows:
    """Consecutive traces, the longest first, of lengths so alike that rows need little padding."""
    groups: Rows = []
    total = 0
    for index in order:
        total += lengths[index]
        size = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else 0
        if groups and size <= batch_tokens and total >= (1 - MAX_PADDING) * size:
            groups[-1].append(index)
        else:
            groups.append([index])
            total = lengths[index]
    return groups


def _rows(group: Sequence[int], lengths: Sequence[int]) -> Rows:
    """Rows of about equal length, as many as little padding allows; one row has no padding."""
    most_positions = sum(lengths[index] for index in group) / (1 - MAX_PADDING)
    # The narrowest rows are as long as the longest trace, and the cost of attention falls with
    # their width.
    for num_rows in range(int(most_positions) // lengths[group[0]], 1, -1):
        rows, width = _balanced(group, lengths, num_rows)
        if num_rows * width <= most_positions:
            return rows
    return [list(group)]


def _balanced(group: Sequence[int], lengths: Sequence[int], num_rows: int) -> tuple[Rows, int]:
    """Add every trace, longest first, to the row shortest so far; return rows and their width."""
    rows: Rows = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    width = 0
    for index in group:
        length, row = filled[0]
        heapq.heapreplace(filled, (length + lengths[index], row))
        rows[row].append(index)
        width = max(width, length + lengths[index])
    return rows, width
