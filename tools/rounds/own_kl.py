"""The distance of a student from its teacher on its own traces, from their cache.

python tools/rounds/own_kl.py CACHE
"""

import sys

from student_train.rounds.figures import OwnFigures
from teacher_cache.format import open_cache


def main() -> None:
    """Print a line."""
    own = OwnFigures.of(open_cache(sys.argv[1]))
    print(
        f"{sys.argv[1]}: KL(student, teacher) {own.kl:.3f} ± {own.kl_error:.3f} nats a token, "
        f"{own.num_traces} traces of {own.mean_tokens:.1f} tokens"
    )


if __name__ == "__main__":
    main()
