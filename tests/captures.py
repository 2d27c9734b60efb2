"""A capture whose teacher is a table: no engine, every row known."""

import json
import os
import signal

import numpy as np

from teacher_cache.capture.noise import PREFIX
from teacher_cache.engines import EngineError, TeacherFacts, TeacherRows

VOCAB_SIZE = 50


OPEN_ID, CLOSE_ID, END_ID = 2, 3, 0


def row_over(token_id):
    """Logprobs of every token after `token_id`; the same on every machine."""
    logits = np.random.default_rng(token_id).normal(0, 2, VOCAB_SIZE)
    return logits - np.logaddexp.reduce(logits)


class TableTeacher:
    """Every next token depends on the last one only; a trace thinks, answers and ends."""

    facts = TeacherFacts("table", "1", "float64", "float64", VOCAB_SIZE, 64)

    def __init__(self, asked, fail_after=None, signal_after=None):
        self.asked = asked
        self.fail_after = fail_after
        self.signal_after = signal_after

    def run(self, requests):
        for number, request in enumerate(requests):
            if number == self.fail_after:
                raise EngineError("the table fell down")
            if number == self.signal_after:
                os.kill(os.getpid(), signal.SIGTERM)
            if not request.request_id.startswith(PREFIX):  # of the noise floor
                self.asked.append(request)
            yield self.rows(request)

    def rows(self, request):
        tokens = list(request.token_ids)
        if request.max_new_tokens:
            rng = np.random.default_rng(request.seed)
            tokens += [OPEN_ID, *rng.integers(5, 40, 6).tolist(), CLOSE_ID, 7, END_ID]
            tokens = tokens[: len(request.token_ids) + request.max_new_tokens]
        first = 1 if request.capture_prompt else len(request.token_ids)
        ids, logprobs = [], []
        for last, token in zip(tokens[first - 1 : -1], tokens[first:], strict=True):
            row = row_over(last)
            ids.append([token, *np.argsort(-row)[:8]])
            logprobs.append(row[ids[-1]])
        ended = tokens[-1] == END_ID
        reason = "scored" if not request.max_new_tokens else "stop" if ended else "length"
        return TeacherRows(
            request.request_id,
            np.array(tokens, np.int32),
            len(request.token_ids),
            first,
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            reason,
        )

    def close(self):
        pass


def write_prompts(path, num_prompts, first=0):
    rows = [{"id": f"p{n}", "prompt": f"a {n}", "answer": n} for n in range(first, num_prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names(asked):
    return [request.request_id for request in asked]
