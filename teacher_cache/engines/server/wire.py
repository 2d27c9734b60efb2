"""The two ways in which a vLLM server takes and gives token ids.

`/inference/v1/generate`, which `vllm serve --enable-scale-out` opens, and `/v1/completions`.

Letters: R rows (tokens with a distribution), K candidates per row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError, Sampling, TeacherRequest, TeacherRows
from teacher_cache.engines.checks import check_rows
from teacher_cache.engines.server.answers import AnswerError, choice_rows, prompt_rows

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
# Float32 logprobs of a row may add up to that much more than 1.
_LARGEST_EXCESS = 0.004
_SCORING = Sampling(temperature=0.0, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class Wire:
    """Bodies of requests, and rows of answers.

    Attributes:
        path: One of `GENERATE` and `COMPLETIONS`.
        model: The teacher's name at the server.
        top_k: Candidates per row (K).
        num_asked: Candidates asked of a drawn token. vLLM's list starts with the token itself and
            is cut to this length, so that K + 1 are needed for K others.
        vocab_size: Width of the softmax: a row cannot have more candidates.
    """

    path: str
    model: str
    top_k: int
    num_asked: int
    vocab_size: int

    def body(self, request: TeacherRequest, sampling: Sampling | None) -> dict[str, Any]:
        """What is sent for a request; a trace is scored as the prompt of one token."""
        is_scoring = request.max_new_tokens == 0
        drawing = _SCORING if is_scoring or sampling is None else sampling
        settings: dict[str, Any] = {
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": drawing.top_k or -1,
            "min_p": drawing.min_p,
            "repetition_penalty": drawing.repetition_penalty,
            "stop_token_ids": list(drawing.stop_ids),
            "seed": request.seed,
            "max_tokens": max(1, request.max_new_tokens),
        }
        if not is_scoring:
            settings["logprobs"] = self.num_asked
        if is_scoring or request.capture_prompt:
            settings["prompt_logprobs"] = self.top_k
        ids = list(request.token_ids)
        if self.path == GENERATE:
            return {
                "model": self.model, "token_ids": ids, "return_token_ids": True,
                "sampling_params": settings,
            }  # fmt: skip
        return {
            "model": self.model, "prompt": ids, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "skip_special_tokens": False, **settings,
        }  # fmt: skip

    def rows(self, request: TeacherRequest, answer: Mapping[str, Any]) -> TeacherRows:
        """The rows of an answer.

        Raises:
            EngineError: If it is not an answer to the request, was cut without being asked, lacks
                candidates, or its values are not logprobs.
        """
        where = f"request {request.request_id!r}"
        try:
            return self._checked_rows(where, request, answer)
        except AnswerError as error:
            raise EngineError(f"{where}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"{where}: not an answer of a vLLM server: {error!r}") from error

    def _checked_rows(
        self, where: str, request: TeacherRequest, answer: Mapping[str, Any]
    ) -> TeacherRows:
        is_scoring = request.max_new_tokens == 0
        (choice,) = answer["choices"]
        echoed = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        _check_prompt(where, request, echoed)
        new = [] if is_scoring else [int(token) for token in choice["token_ids"]]
        finish = "scored" if is_scoring else str(choice["finish_reason"])
        if not is_scoring:
            _check_end(where, request, new, finish)
        rows: list[dict[int, float]] = []
        capture_given = is_scoring or request.capture_prompt
        if capture_given:
            given = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
            rows += prompt_rows(given, len(request.token_ids))
        num_prompt_rows = len(rows)
        if not is_scoring:
            rows += choice_rows(choice.get("logprobs"), new)
        tokens = np.array([*request.token_ids, *new], np.int32)
        first = 1 if capture_given else len(request.token_ids)
        ids, logprobs = self._arrays(where, rows, tokens[first:], num_prompt_rows)
        found = TeacherRows(
            request.request_id, tokens, len(request.token_ids), first, ids, logprobs, finish
        )
        check_rows(found)
        return found

    def _arrays(
        self,
        where: str,
        rows: Sequence[Mapping[int, float]],
        tokens: NDArray[np.int32],
        num_prompt_rows: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """[R, 1 + K] the token itself, then the K most probable; -inf where there is no K-th."""
        ids = np.zeros((len(rows), 1 + self.top_k), np.int32)
        logprobs = np.full(ids.shape, -np.inf, np.float32)
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token not in row:
                raise EngineError(
                    f"{where}: row {number} has no logprob of its own token {token} (the server "
                    "may write -9999 below its last rank)"
                )
            best = sorted(row.items(), key=lambda entry: (-entry[1], entry[0]))
            is_given = number < num_prompt_rows  # such rows have K besides the token itself
            asked = self.top_k if is_given else self.num_asked
            self._check_row(where, number, best, token, asked)
            is_whole = is_given or asked > self.top_k
            best = best[: self.top_k] if is_whole else _ranked(best, token, self.top_k)
            ids[number, 0], logprobs[number, 0] = token, row[token]
            ids[number, 1 : 1 + len(best)] = [entry[0] for entry in best]
            logprobs[number, 1 : 1 + len(best)] = [entry[1] for entry in best]
        return ids, logprobs

    def _check_row(
        self, where: str, number: int, best: list[tuple[int, float]], token: int, asked: int
    ) -> None:
        """Refuse rows with fewer candidates than were asked, or whose values are no logprobs."""
        if len(best) < min(asked, self.vocab_size):
            raise EngineError(
                f"{where}: asked for {asked} candidates, row {number} (token {token}) has "
                f"{len(best)} logprobs: the server gives no more. Lower --top-k"
            )
        total = float(np.exp([value for _, value in best], dtype=np.float64).sum())
        if not total <= 1 + _LARGEST_EXCESS:
            raise EngineError(
                f"{where}: the probabilities of row {number} add up to {total:.4g}: these are no "
                "logprobs of the model at temperature 1"
            )


def _ranked(best: list[tuple[int, float]], token: int, top_k: int) -> list[tuple[int, float]]:
    """The candidates of a row of K entries, the token itself among them.

    If it is the least probable one, it may have taken the place of the K-th.
    """
    if len(best) == top_k and best[-1][0] == token:
        return best[:-1]
    return best[:top_k]


def _check_prompt(where: str, request: TeacherRequest, echoed: Sequence[int] | None) -> None:
    if echoed is None or list(echoed) != list(request.token_ids):
        raise EngineError(
            f"{where}: the server did not answer the {len(request.token_ids)} tokens that it was "
            "asked: it adds or changes tokens of the prompt"
            if echoed is not None
            else f"{where}: the server does not say which tokens it was asked (return_token_ids)"
        )


def _check_end(where: str, request: TeacherRequest, new: Sequence[int], finish: str) -> None:
    if finish not in ("stop", "length"):
        raise EngineError(f"{where}: the server ended it as {finish!r}")
    if finish == "length" and len(new) < request.max_new_tokens:
        raise EngineError(
            f"{where}: cut after {len(new)} of {request.max_new_tokens} tokens: the server has a "
            "limit of its own. Raise it there, or lower --max-new-tokens to it"
        )
