"""Places in a trace of the skill that the base student lacks.

    python tools/truncation/carries.py CACHE > carries.csv

The skill is to carry units beside a number of three digits. Prints the share of the places that
need it inside each lead span, by number of prices.
"""

import csv
import re
import sys
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer

from teacher_cache.format import lead_span_length, open_cache

SPANS = (0.1, 0.25, 0.4, 0.5, 0.75, 1.0)
TOKENIZER = Path(__file__).parents[1] / "tiny-teacher"
# `164 + $26: 4+6=10, 6+2+1=9`: summands, the units' result, the carry.
ADDITION = re.compile(r" \$?(\d+) \+ \$?(\d+): \d\+\d=(\d+), \d\+\d\+(\d)=")


def main() -> None:
    cache = open_cache(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    inside: dict[str, list[list[bool]]] = defaultdict(list)
    for shard, commit in enumerate(cache.shards):
        keep = {row: info.n_total for row, info in enumerate(commit.traces)}
        for row, trace in cache.read(shard, keep).items():
            pieces = [tokenizer.decode([token]) for token in trace.token_ids]
            for token in _carries(pieces):
                lies = [token < lead_span_length(len(pieces), span) for span in SPANS]
                inside["all"].append(lies)
                inside[str(commit.traces[row].fields["operands"])].append(lies)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["prices", "carries", *SPANS])
    for prices, found in sorted(inside.items()):
        shares = [sum(column) / len(found) for column in zip(*found, strict=True)]
        writer.writerow([prices, len(found), *(f"{share:.3f}" for share in shares)])


def _carries(pieces: list[str]) -> list[int]:
    """Tokens that write a carry where the base student would write 0."""
    ends = list(accumulate(len(piece) for piece in pieces))
    return [
        next(token for token, end in enumerate(ends) if end > found.start(4))
        for found in ADDITION.finditer("".join(pieces))
        if max(int(found[1]), int(found[2])) >= 100 and int(found[3]) >= 10
    ]


if __name__ == "__main__":
    main()
