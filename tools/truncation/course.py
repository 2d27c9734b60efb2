"""`train-student run` with a mixture's lengths dealt in the order of training, not by hash.

    python tools/truncation/course.py rising|falling --lead-span 0.375:4,1:1 OPTION ...

The same share of the tokens has each length as with `train-student run`; `rising` gives the
shortest to the first steps and the longest to the last, `falling` the other way round. For one
epoch, of which a step's traces are known beforehand. An experiment, not an option of the command.
"""

import sys
from dataclasses import replace

import numpy as np

from student_train.cli.group import cli
from student_train.data import draw, stream
from student_train.data.order import data_order
from student_train.data.tokens import TokenSelection
from student_train.data.traces import CacheTraces, TrainingData
from student_train.run import inputs, memory_estimate


def course_spans(
    source: CacheTraces, selection: TokenSelection, seed: int, *, rises: bool
) -> draw.DrawnSpans:
    """`draw_spans`, each length where the order of epoch 0 reaches it."""
    order = data_order(TrainingData((source,)), seed=seed, epoch=0)
    catalog = source.cache.catalog
    rows = catalog.first_row[order.shard] + order.row
    num_tokens = catalog.numbers("n_total")[rows]
    quantiles = (np.cumsum(num_tokens) - num_tokens / 2) / num_tokens.sum()
    lengths = selection.lengths
    choice = np.zeros(catalog.num_rows, np.int16)
    choice[rows] = [lengths.index_at(q if rises else 1 - q) for q in quantiles.tolist()]
    return replace(draw.draw_spans(source, selection, seed), choice=choice, is_by_shard=False)


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in ("rising", "falling"):
        sys.exit(__doc__)
    rises = sys.argv.pop(1) == "rising"
    for module in (stream, inputs, memory_estimate):
        module.draw_spans = lambda source, selection, seed: course_spans(
            source, selection, seed, rises=rises
        )
    cli(["run", *sys.argv[1:]])


if __name__ == "__main__":
    main()
