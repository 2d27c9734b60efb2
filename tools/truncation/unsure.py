"""`train-student run` with labels only where the untrained student is unsure (arXiv 2602.01395).

    python tools/truncation/unsure.py measure CACHE STUDENT unsure.npz
    python tools/truncation/unsure.py run unsure.npz --loss-dropout 0.8 OPTION ...

`measure` writes the student's entropy over every token of every trace. `run` keeps, of each trace,
the labels with the largest ones, as many as `--loss-dropout` keeps at random: 0.8 leaves a fifth.
For caches with a distribution over every token but the first, and for whole traces. An experiment,
not an option of the command.
"""

import sys

import numpy as np
from numpy.typing import NDArray

from student_train.cli.group import cli
from student_train.data.tokens import LossDropout


def measure(cache: str, student: str, file: str) -> None:
    """Write [n - 1] entropies of each trace of n tokens, in nats."""
    import torch

    from student_train.model.load import load_model
    from teacher_cache.format import open_cache

    model, _ = load_model(student, dtype=torch.float32)
    found = {}
    for trace in open_cache(cache):
        ids = torch.from_numpy(trace.token_ids[:-1].astype(np.int64))[None, :]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        found[trace.trace_id] = -(logprobs.exp() * logprobs).sum(-1).numpy()
    np.savez(file, **found)


def run(file: str, words: list[str]) -> None:
    """Run the command with labels chosen by entropy."""
    entropies = dict(np.load(file))

    def kept(dropout: LossDropout, trace_id: str, num_valid: int) -> NDArray[np.bool_]:
        if len(entropies[trace_id]) != num_valid:
            raise ValueError(f"trace {trace_id!r}: expected labels on all tokens but the first")
        chosen = np.zeros(num_valid, np.bool_)
        num_kept = num_valid - round(dropout.share * num_valid)
        chosen[np.argsort(-entropies[trace_id], kind="stable")[:num_kept]] = True
        return chosen

    LossDropout.kept = kept
    cli(["run", *words])


def main() -> None:
    match sys.argv[1:]:
        case ["measure", cache, student, file]:
            measure(cache, student, file)
        case ["run", file, *words]:
            run(file, words)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
